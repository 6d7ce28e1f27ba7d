//! Maps from names in certificates, or of the operating system's users, to roles, in the manner of pg_ident.conf.
//! Source: PostgreSQL documentation, "User Name Maps".

/// One line: in this map, this name may log in as this role.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    map: String,
    name: String,
    /// `None`: `all`.
    role: Option<String>,
}

/// All maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Maps(Vec<Entry>);

impl Maps {
    pub fn parse(text: &str) -> Result<Self, (usize, String)> {
        let mut entries = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace().map(|word| word.trim_matches('"').to_owned());
            let Some(map) = words.next() else { continue };
            let (Some(name), Some(role), None) = (words.next(), words.next(), words.next()) else {
                return Err((index + 1, "a line is: map, name in the certificate or of the system's user, role".into()));
            };
            if name.starts_with('/') || role.starts_with(['/', '+']) {
                return Err((index + 1, "regular expressions and memberships are not supported: write the names".into()));
            }
            entries.push(Entry { map, name, role: (role != "all").then_some(role) });
        }
        Ok(Maps(entries))
    }

    pub fn has(&self, map: &str) -> bool {
        self.0.iter().any(|entry| entry.map == map)
    }

    /// Without a map the name must be the role.
    pub fn allow(&self, map: Option<&str>, name: &str, role: &str) -> bool {
        match map {
            None => name == role,
            Some(map) => self
                .0
                .iter()
                .any(|entry| entry.map == map && entry.name == name && entry.role.as_deref().is_none_or(|allowed| allowed == role)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_roles() {
        let maps = Maps::parse("# map name role\nweb  web-1.example  app\nweb \"root\" all # any\n").unwrap();
        for (map, name, role, allowed) in [
            (None, "app", "app", true),
            (None, "web-1.example", "app", false),
            (Some("web"), "web-1.example", "app", true),
            (Some("web"), "web-1.example", "postgres", false),
            (Some("web"), "app", "app", false),
            (Some("web"), "root", "postgres", true),
            (Some("other"), "root", "postgres", false),
        ] {
            assert_eq!(maps.allow(map, name, role), allowed, "{map:?} {name} {role}");
        }
        assert_eq!(Maps::parse("a b\n").unwrap_err().0, 1);
        assert_eq!(Maps::parse("\na /^(.*)$ c\n").unwrap_err().0, 2);
    }
}
