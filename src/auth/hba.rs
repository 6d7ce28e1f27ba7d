//! Rules in the manner of pg_hba.conf: the first that fits a connection says how it must authenticate. What is not
//! understood is refused when it is read, never skipped: a rule that silently does not count opens or closes a door.
//! Source: PostgreSQL documentation, "The pg_hba.conf File".

use std::net::IpAddr;

/// How a client must show who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Not at all.
    Trust,
    /// It is refused.
    Reject,
    /// The password, in clear.
    Password,
    /// SCRAM if the stored secret can do it, else an md5 challenge.
    Md5,
    /// SCRAM.
    Scram,
    /// A certificate whose common name is, or maps to, the role.
    Cert,
    /// The operating system's user at the other end of a Unix socket, whose name is, or maps to, the role.
    Peer,
    /// The owner of the writes decides; messages are passed on.
    Relay,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Any,
    Tls,
    Plain,
    /// Never: there is none here.
    Gss,
    Local,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Database {
    All,
    SameUser,
    Replication,
    Named(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Addresses {
    All,
    Network { address: IpAddr, bits: u32 },
}

/// What `clientcert` demands besides the method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientCertificate {
    /// Nothing.
    No,
    /// One of a known authority.
    VerifyCa,
    /// The same, for this role.
    VerifyFull,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    transport: Transport,
    databases: Vec<Database>,
    /// `None`: all.
    users: Option<Vec<String>>,
    addresses: Addresses,
    /// How.
    pub method: Method,
    /// And with a certificate?
    pub client_certificate: ClientCertificate,
    /// The map of pg_ident's file that leads from certificates' names, or users of the operating system, to roles.
    pub map: Option<String>,
}

/// A connection as rules see it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attempt<'a> {
    pub tls: bool,
    /// `None`: a Unix socket.
    pub address: Option<IpAddr>,
    pub database: &'a str,
    pub user: &'a str,
    /// `replication=true`: no database is meant.
    pub physical_replication: bool,
}

impl Rule {
    /// All rules of a text, in order.
    ///
    /// # Errors
    /// The number of the line and what is wrong with it.
    pub(super) fn parse_all(text: &str) -> Result<Vec<Self>, (usize, String)> {
        let mut rules = Vec::new();
        let (mut line, mut begun) = (String::new(), 0);
        for (index, part) in text.lines().enumerate() {
            if line.is_empty() {
                begun = index + 1;
            }
            if let Some(part) = part.strip_suffix('\\') {
                line.push_str(part);
                line.push(' ');
                continue;
            }
            line.push_str(part);
            rules.extend(Self::parse(&std::mem::take(&mut line)).map_err(|reason| (begun, reason))?);
        }
        rules.extend(Self::parse(&line).map_err(|reason| (begun, reason))?);
        Ok(rules)
    }

    /// One line; `None`: nothing but a comment.
    pub(super) fn parse(line: &str) -> Result<Option<Self>, String> {
        let fields = fields(line)?;
        let mut fields = fields.into_iter();
        let Some(kind) = fields.next() else { return Ok(None) };
        let transport = match single(&kind)? {
            "local" => Transport::Local,
            "host" | "hostnogssenc" => Transport::Any,
            "hostssl" => Transport::Tls,
            "hostnossl" => Transport::Plain,
            "hostgssenc" => Transport::Gss,
            other => return Err(format!("a rule begins with local, host, hostssl or hostnossl, not `{other}`")),
        };
        let databases = fields.next().ok_or("the rule ends before the database")?;
        let databases = databases.into_iter().map(Database::parse).collect::<Result<_, _>>()?;
        let users = users(fields.next().ok_or("the rule ends before the user")?)?;
        let mut rest = fields.peekable();
        let addresses = match transport {
            Transport::Local => Addresses::All,
            _ => {
                let text = rest.next().ok_or("the rule ends before the address")?;
                let mask = rest.next_if(|next| !single(&text).unwrap_or("/").contains('/') && mask_bits(next).is_some());
                Addresses::parse(single(&text)?, mask.as_ref().and_then(|mask| mask_bits(mask)))?
            }
        };
        let method = match single(&rest.next().ok_or("the rule ends before the method")?)? {
            "trust" => Method::Trust,
            "reject" => Method::Reject,
            "password" => Method::Password,
            "md5" => Method::Md5,
            "scram-sha-256" => Method::Scram,
            "cert" => Method::Cert,
            "peer" => Method::Peer,
            "relay" => Method::Relay,
            other => {
                return Err(format!(
                    "method `{other}` is not one that understudy knows (trust, reject, password, md5, scram-sha-256, cert, peer, relay)"
                ));
            }
        };
        let mut rule = Rule { transport, databases, users, addresses, method, client_certificate: ClientCertificate::No, map: None };
        for option in rest {
            match single(&option)?.split_once('=') {
                Some(("clientcert", "verify-ca")) if method != Method::Cert => rule.client_certificate = ClientCertificate::VerifyCa,
                Some(("clientcert", "verify-full")) => rule.client_certificate = ClientCertificate::VerifyFull,
                Some(("map", map)) => rule.map = Some(map.to_owned()),
                _ => return Err(format!("option `{}` is not one that understudy knows (clientcert=…, map=…)", option.join(","))),
            }
        }
        if method == Method::Cert {
            rule.client_certificate = ClientCertificate::VerifyFull;
        }
        if rule.client_certificate != ClientCertificate::No && transport != Transport::Tls {
            return Err("certificates come with hostssl only".into());
        }
        if method == Method::Peer && transport != Transport::Local {
            return Err("peer is for local rules only: nobody vouches for a user behind an address".into());
        }
        Ok(Some(rule))
    }

    pub(super) fn fits(&self, attempt: &Attempt<'_>) -> bool {
        let transport = match (self.transport, attempt.address) {
            (Transport::Local, None) => true,
            (Transport::Local, Some(_)) | (_, None) | (Transport::Gss, _) => false,
            (Transport::Any, _) => true,
            (Transport::Tls, _) => attempt.tls,
            (Transport::Plain, _) => !attempt.tls,
        };
        transport
            && attempt.address.is_none_or(|address| self.addresses.hold(address))
            && self.databases.iter().any(|database| database.fits(attempt))
            && self.users.as_ref().is_none_or(|users| users.iter().any(|user| user == attempt.user))
    }
}

impl Database {
    fn parse(text: Field) -> Result<Self, String> {
        Ok(match text {
            Field::Bare(text) => match text.as_str() {
                "all" => Database::All,
                "sameuser" => Database::SameUser,
                "replication" => Database::Replication,
                "samerole" | "samegroup" => {
                    return Err("samerole needs the server's roles, which are not known here: name databases".into());
                }
                text => Database::Named(plain(text)?.to_owned()),
            },
            Field::Quoted(text) => Database::Named(text),
        })
    }

    fn fits(&self, attempt: &Attempt<'_>) -> bool {
        match self {
            Database::Replication => attempt.physical_replication,
            _ if attempt.physical_replication => false,
            Database::All => true,
            Database::SameUser => attempt.database == attempt.user,
            Database::Named(name) => name == attempt.database,
        }
    }
}

impl Addresses {
    fn parse(text: &str, mask: Option<u32>) -> Result<Self, String> {
        if text == "all" {
            return Ok(Addresses::All);
        }
        let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let Ok(address) = address.parse::<IpAddr>() else {
            return Err(format!(
                "`{text}` is not an address such as 10.0.0.0/8 or all; host names, samehost and samenet are not looked up"
            ));
        };
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            Some(bits) => bits.parse().ok(),
            None => mask,
        };
        match bits {
            Some(bits) if bits <= most => Ok(Addresses::Network { address, bits }),
            _ => Err(format!("`{text}` needs the length of its network: {address}/{most} for this address alone")),
        }
    }

    fn hold(&self, address: IpAddr) -> bool {
        let Addresses::Network { address: network, bits } = self else { return true };
        match (network.to_canonical(), address.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                let shift = 32 - bits.min(&32);
                u32::from(network).checked_shr(shift).unwrap_or(0) == u32::from(address).checked_shr(shift).unwrap_or(0)
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                let shift = 128 - bits.min(&128);
                u128::from(network).checked_shr(shift).unwrap_or(0) == u128::from(address).checked_shr(shift).unwrap_or(0)
            }
            _ => false,
        }
    }
}

/// `255.255.255.0` as 24. A mask with holes is none.
fn mask_bits(field: &[Field]) -> Option<u32> {
    let ones = |ones: u32, zeros: u32, size: u32| (ones + zeros == size).then_some(ones);
    match single(field).ok()?.parse().ok()? {
        IpAddr::V4(mask) => ones(u32::from(mask).leading_ones(), u32::from(mask).trailing_zeros(), 32),
        IpAddr::V6(mask) => ones(u128::from(mask).leading_ones(), u128::from(mask).trailing_zeros(), 128),
    }
}

fn users(field: Vec<Field>) -> Result<Option<Vec<String>>, String> {
    let mut users = Vec::new();
    for user in field {
        match user {
            Field::Bare(text) if text == "all" => return Ok(None),
            Field::Bare(text) if text.starts_with('+') => {
                return Err(format!("`{text}`: memberships of roles are not known here: name the users"));
            }
            Field::Bare(text) => users.push(plain(&text)?.to_owned()),
            Field::Quoted(text) => users.push(text),
        }
    }
    Ok(Some(users))
}

fn plain(text: &str) -> Result<&str, String> {
    match text.chars().next() {
        Some('@') => Err(format!("`{text}`: other files are not included: write the names here")),
        Some('/') => Err(format!("`{text}`: regular expressions are not supported: write the names")),
        _ => Ok(text),
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Field {
    Bare(String),
    Quoted(String),
}

impl std::borrow::Borrow<str> for Field {
    fn borrow(&self) -> &str {
        match self {
            Field::Bare(text) | Field::Quoted(text) => text,
        }
    }
}

fn single(field: &[Field]) -> Result<&str, String> {
    match field {
        [Field::Bare(text) | Field::Quoted(text)] => Ok(text),
        _ => Err(format!("`{}`: one word belongs here", field.join(","))),
    }
}

/// Words of a line; each may be a list with commas.
fn fields(line: &str) -> Result<Vec<Vec<Field>>, String> {
    let mut fields = Vec::new();
    let mut field = Vec::new();
    let mut rest = line;
    loop {
        let spaced = rest.starts_with([' ', '\t']);
        rest = rest.trim_start();
        if rest.is_empty() || rest.starts_with('#') {
            break;
        }
        if let Some(tail) = rest.strip_prefix(',') {
            rest = tail;
            let (word, tail) = word(rest.trim_start())?;
            field.push(word);
            rest = tail;
            continue;
        }
        if spaced && !field.is_empty() {
            fields.push(std::mem::take(&mut field));
        }
        let (word, tail) = word(rest)?;
        field.push(word);
        rest = tail;
    }
    if !field.is_empty() {
        fields.push(field);
    }
    Ok(fields)
}

fn word(rest: &str) -> Result<(Field, &str), String> {
    if let Some(quoted) = rest.strip_prefix('"') {
        let (text, tail) = quoted.split_once('"').ok_or("a quote is not closed")?;
        return Ok((Field::Quoted(text.to_owned()), tail));
    }
    let end = rest.find([' ', '\t', ',', '#', '"']).unwrap_or(rest.len());
    match rest.split_at(end) {
        ("", _) => Err("a word is missing".into()),
        (text, tail) => Ok((Field::Bare(text.to_owned()), tail)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits(rule: &str, tls: bool, address: &str, database: &str, user: &str) -> bool {
        let address = address.parse().ok();
        Rule::parse(rule).unwrap().unwrap().fits(&Attempt { tls, address, database, user, physical_replication: false })
    }

    #[test]
    fn rules_fit_as_the_manual_says() {
        for (rule, tls, address, database, user, expected) in [
            ("host all all all md5", false, "10.1.2.3", "shop", "app", true),
            ("hostssl all all all md5", false, "10.1.2.3", "shop", "app", false),
            ("hostssl all all all md5", true, "10.1.2.3", "shop", "app", true),
            ("hostnossl all all all md5", true, "10.1.2.3", "shop", "app", false),
            ("host shop app 10.0.0.0/8 md5", false, "10.1.2.3", "shop", "app", true),
            ("host shop app 10.0.0.0/8 md5", false, "11.1.2.3", "shop", "app", false),
            ("host shop app 10.0.0.0 255.0.0.0 md5 # why", false, "10.1.2.3", "shop", "app", true),
            ("host shop,store app,\"Web App\" 0.0.0.0/0 md5", false, "10.1.2.3", "store", "Web App", true),
            ("host shop, store app 0.0.0.0/0 md5", false, "10.1.2.3", "store", "app", true),
            ("host \"all\" all all md5", false, "10.1.2.3", "shop", "app", false),
            ("host sameuser all all md5", false, "10.1.2.3", "app", "app", true),
            ("host sameuser all all md5", false, "10.1.2.3", "shop", "app", false),
            ("host replication all all md5", false, "10.1.2.3", "shop", "app", false),
            ("host all all ::1/128 trust", false, "::1", "shop", "app", true),
            ("host all all 127.0.0.1/32 trust", false, "::ffff:127.0.0.1", "shop", "app", true),
            ("host all all 0.0.0.0/0 trust", false, "::1", "shop", "app", false),
            ("host all all ::/0 trust", false, "2001:db8::1", "shop", "app", true),
            ("hostgssenc all all all trust", true, "::1", "shop", "app", false),
            ("local all all trust", false, "none", "shop", "app", true),
            ("local all all trust", false, "10.0.0.1", "shop", "app", false),
            ("host all all all trust", false, "none", "shop", "app", false),
        ] {
            assert_eq!(fits(rule, tls, address, database, user), expected, "{rule} for {user} at {address} in {database}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        assert_eq!(Rule::parse("  # nothing"), Ok(None));
        for (rule, part) in [
            ("hosts all all all md5", "hostssl"),
            ("host all all all", "method"),
            ("host all all all ldap", "ldap"),
            ("host all all db.example md5", "not looked up"),
            ("host all all samenet md5", "not looked up"),
            ("host all all 10.0.0.1 md5", "/32"),
            ("host all all 10.0.0.0/33 md5", "/32"),
            ("host all +staff all md5", "memberships"),
            ("host @names all all md5", "included"),
            ("host all /^a all md5", "regular"),
            ("host samerole all all md5", "samerole"),
            ("host all all all md5 radius=1", "radius"),
            ("host all all all cert", "hostssl"),
            ("host all all all peer", "local rules"),
            ("local all all cert", "hostssl"),
            ("host \"shop all all md5", "quote"),
            ("host shop, all md5", "address"),
        ] {
            let error = Rule::parse(rule).expect_err(rule);
            assert!(error.contains(part), "{rule}: {error}");
        }
        assert_eq!(Rule::parse_all("host all \\\n all all md5\n\nhost all\n").unwrap_err().0, 4);
    }
}
