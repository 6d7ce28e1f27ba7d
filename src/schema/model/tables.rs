//! Features of a removed and an added table. What tells a rename from a drop and a create is not only that the columns are the same: a table that was
//! made anew has them in another order.

use super::{
    learn::Shape,
    matching::{Margins, Pair, groups},
    similarity::{common_subsequence, is_camel, jaccard, jaro_winkler, replaced_words, singular, snake, soft_overlap, trigram},
    t1::tokens,
};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// The only shape.
pub const SHAPE: Shape = Shape { direction: &DIRECTION, crossed: &[0, 3, 4, 8, 10, 12, 15, 20], share: 0.5 };

#[rustfmt::skip]
const DIRECTION: [i8; 30] = [
    1, 1, -1, 1, 1, 1, 1, 1, // order, columns with words replaced as in the name, types
    1, 1, 1, 1, 1, 1, 1,     // columns and names
    1, 1, 1, 1, 1, 1,        // similarity and margins
    -1, 0, 0, 0,             // sizes
    1, 1, 0, 0, 0,           // all the same, all in order, style, how many
];

/// Columns that most tables have.
#[rustfmt::skip]
const COMMON: [&str; 22] = [
    "id", "created_at", "updated_at", "deleted_at", "createdat", "updatedat", "deletedat", "name", "description", "type", "status",
    "created_by", "updated_by", "version", "uuid", "created", "updated", "created_on", "updated_on", "create_time", "update_time", "public_id",
];

type Columns = Vec<(String, String)>;

fn flag(value: bool) -> f64 {
    f64::from(u8::from(value))
}

/// Share of `part` in `whole`; nothing of nothing is nothing.
fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

/// How rare columns and words are in one comparison.
struct Rarity {
    columns: HashMap<String, f64>,
    words: HashMap<String, f64>,
    tables: f64,
}

impl Rarity {
    fn new(members: &[&Pair], columns: &[(Columns, Columns)]) -> Self {
        let mut sides: BTreeMap<(bool, &str), &Columns> = BTreeMap::new();
        for (pair, (old, new)) in members.iter().zip(columns) {
            sides.insert((true, &pair.old.name), old);
            sides.insert((false, &pair.new.name), new);
        }
        let mut rarity = Rarity { columns: HashMap::new(), words: HashMap::new(), tables: sides.len() as f64 };
        for ((_, name), columns) in sides {
            for column in columns.iter().map(|column| &column.0).collect::<BTreeSet<_>>() {
                *rarity.columns.entry(column.clone()).or_default() += 1.0;
            }
            for word in tokens(name).into_iter().collect::<BTreeSet<_>>() {
                *rarity.words.entry(word).or_default() += 1.0;
            }
        }
        rarity
    }

    fn of(&self, seen: Option<&f64>, least: f64) -> f64 {
        ((self.tables + 2.0) / (seen.copied().unwrap_or(1.0) + 0.5)).ln().max(least)
    }

    fn column(&self, name: &str) -> f64 {
        let weight = self.of(self.columns.get(name), 0.05);
        if COMMON.contains(&name) { weight * 0.3 } else { weight }
    }

    fn word(&self, word: &str) -> f64 {
        self.of(self.words.get(word), 0.1)
    }

    /// Columns by weight: Jaccard, contained, typed Jaccard; plain Jaccard; words of the names, contained; same start; a total.
    fn similarities(&self, pair: &Pair, old: &Columns, new: &Columns) -> [f64; 8] {
        let names = |columns: &Columns| columns.iter().map(|column| column.0.clone()).collect::<BTreeSet<_>>();
        let (old_names, new_names) = (names(old), names(new));
        let sum = |names: &mut dyn Iterator<Item = &String>| names.map(|name| self.column(name)).sum::<f64>();
        let common = sum(&mut old_names.intersection(&new_names));
        let lighter = sum(&mut old_names.iter()).min(sum(&mut new_names.iter()));
        let (old_typed, new_typed): (BTreeSet<_>, BTreeSet<_>) = (old.iter().collect(), new.iter().collect());
        let typed = share(
            old_typed.intersection(&new_typed).map(|column| self.column(&column.0)).sum(),
            old_typed.union(&new_typed).map(|column| self.column(&column.0)).sum(),
        );
        let (words, contained) = soft_overlap(&tokens(&pair.old.name), &tokens(&pair.new.name), &|word| self.word(word));
        let start = old.iter().zip(new).take_while(|(a, b)| a.0 == b.0).count();
        [
            share(common, sum(&mut old_names.union(&new_names))),
            share(common, lighter),
            typed,
            jaccard(&old_names, &new_names),
            words,
            contained,
            share(start as f64, old.len().max(new.len()) as f64),
            typed + 0.5 * words,
        ]
    }
}

/// A prefix that most columns of a table share says nothing: `ods_id` is `id`.
fn without_prefix(name: &str, columns: &Columns) -> String {
    let Some((prefix, rest)) = name.split_once('_') else { return name.to_owned() };
    let sharing = columns.iter().filter(|(other, _)| other.split_once('_').is_some_and(|(first, _)| first == prefix)).count();
    if columns.len() >= 2 && sharing * 2 > columns.len() { rest.to_owned() } else { name.to_owned() }
}

/// Place by place: the same name counts whole, the same type half.
fn place_by_place(old: &Columns, new: &Columns) -> f64 {
    let score = |(a, b): (&(String, String), &(String, String))| match (a.0 == b.0, a.1 == b.1) {
        (true, _) => 1.0,
        (false, true) => 0.5,
        (false, false) => 0.0,
    };
    share(old.iter().zip(new).map(score).sum(), old.len().max(new.len()) as f64)
}

/// Columns under the words that replaced others in the table's name (`user_ban.user_id` is `person_ban.person_id`), and without a common prefix.
fn renamed_columns(pair: &Pair, old: &Columns, new: &Columns) -> f64 {
    let (from, to) = replaced_words(&tokens(&pair.old.name), &tokens(&pair.new.name));
    let replaced = |name: &str| {
        let name = snake(name);
        if from.is_empty() || to.is_empty() {
            return name;
        }
        let wrapped = format!("_{name}_").replace(&format!("_{}_", singular(&from)), &format!("_{}_", singular(&to)));
        wrapped.trim_matches('_').to_owned()
    };
    let old: BTreeSet<String> = old.iter().map(|(name, _)| without_prefix(&replaced(name), old)).collect();
    let new: BTreeSet<String> = new.iter().map(|(name, _)| without_prefix(&snake(name), new)).collect();
    jaccard(&old, &new)
}

fn pair_features(pair: &Pair, old: &Columns, new: &Columns, x: &[f64; 8], margins: &Margins<'_, 8>, replaced: f64) -> Vec<f64> {
    let common = |one: &Columns, other: &Columns| -> Vec<String> {
        one.iter().map(|column| column.0.clone()).filter(|name| other.iter().any(|column| column.0 == *name)).collect()
    };
    let (in_old, in_new) = (common(old, new), common(new, old));
    let in_order = common_subsequence(&in_old, &in_new);
    let disorder = in_old.len().saturating_sub(in_order) as f64;
    let types = |columns: &Columns| columns.iter().map(|column| column.1.clone()).collect::<Vec<_>>();
    let same_types = share(common_subsequence(&types(old), &types(new)) as f64, old.len().max(new.len()) as f64);
    let renamed = renamed_columns(pair, old, new);
    let name = jaro_winkler(&pair.old.name, &pair.new.name);
    let (narrow, wide) = (old.len().min(new.len()) as f64, old.len().max(new.len()) as f64);
    vec![
        share(in_order as f64, in_old.len() as f64),
        flag(in_old.len() > 1 && disorder == 0.0),
        disorder.min(5.0),
        renamed,
        same_types,
        replaced,
        place_by_place(old, new),
        renamed * x[4],
        x[0],
        x[1],
        x[2],
        x[3],
        x[4],
        x[5],
        x[6],
        name,
        trigram(&pair.old.name, &pair.new.name),
        x[2] * name,
        margins.of(pair, 2, x[2]),
        margins.of(pair, 4, x[4]),
        margins.of(pair, 7, x[7]),
        (wide - narrow) / wide.max(1.0),
        narrow.min(16.0) / 16.0,
        flag(pair.counts.0 <= 1.0 && pair.counts.1 <= 1.0),
        (pair.counts.0 * pair.counts.1).max(1.0).ln(),
        flag(old == new),
        flag(in_old.len() >= 2 && in_old.len() == old.len().min(new.len()) && disorder == 0.0),
        flag([&pair.old, &pair.new].iter().any(|side| is_camel(&side.name) || side.columns.iter().any(|(name, _)| is_camel(name)))),
        pair.counts.0.max(1.0).ln(),
        pair.counts.1.max(1.0).ln(),
    ]
}

/// Features of table pairs; rivals are looked for inside each group.
pub fn features(pairs: &[Pair]) -> Vec<Vec<f64>> {
    let lower = |columns: &Columns| columns.iter().map(|(name, kind)| (name.to_lowercase(), kind.clone())).collect::<Columns>();
    let mut result = vec![Vec::new(); pairs.len()];
    for members in groups(pairs).into_values() {
        let of_group: Vec<&Pair> = members.iter().map(|at| &pairs[*at]).collect();
        let columns: Vec<(Columns, Columns)> = of_group.iter().map(|pair| (lower(&pair.old.columns), lower(&pair.new.columns))).collect();
        let mut replaced: HashMap<(String, String), BTreeSet<(&str, &str)>> = HashMap::new();
        for pair in &of_group {
            let (old, new) = (tokens(&pair.old.name), tokens(&pair.new.name));
            if old.iter().any(|word| new.contains(word)) {
                replaced.entry(replaced_words(&old, &new)).or_default().insert((&pair.old.name, &pair.new.name));
            }
        }
        let rarity = Rarity::new(&of_group, &columns);
        let similarities: Vec<[f64; 8]> =
            of_group.iter().zip(&columns).map(|(pair, (old, new))| rarity.similarities(pair, old, new)).collect();
        let margins = Margins::new(of_group.iter().copied().zip(&similarities));
        for (slot, at) in members.iter().enumerate() {
            let (pair, (old, new)) = (of_group[slot], &columns[slot]);
            let words = replaced_words(&tokens(&pair.old.name), &tokens(&pair.new.name));
            let elsewhere = replaced.get(&words).map_or(1, BTreeSet::len).max(1) as f64;
            result[*at] = pair_features(pair, old, new, &similarities[slot], &margins, elsewhere.ln());
        }
    }
    result
}
