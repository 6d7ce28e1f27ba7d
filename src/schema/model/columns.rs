//! Features of a removed and an added column: names, types and constraints, how much better they fit each other than their rivals, what the same
//! comparison shows in other tables, and (for one lineage) where they stand among the columns that stayed.

use super::{
    learn::Shape,
    matching::{Margins, Pair, Side, groups},
    similarity::{is_camel, jaro_winkler, levenshtein_ratio, replaced_words, soft_overlap, trigram},
    t1::{tokens, type_class},
};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Features without those of the position.
pub const PLAIN: usize = 34;

/// Two schemas that grew apart.
pub const SHAPE: Shape = Shape { direction: &DIRECTION, crossed: &[2, 3, 5, 6, 11, 14, 15, 17, 19], share: 0.33 };
/// One lineage: positions mean something.
pub const SHAPE_WITH_POSITION: Shape = Shape { direction: &DIRECTION, crossed: &[2, 3, 5, 14, 15, 17, 19, 38, 40], share: 0.2 };

#[rustfmt::skip]
const DIRECTION: [i8; PLAIN + 9] = [
    1, 1, 1, 1, 1,        // names
    1, 1, 1,              // types
    1, 0, 1, -1, 1, 0,    // NOT NULL, references, defaults
    1, 1, 1, 1,           // margins
    0, 0, 0, 0,           // how many candidates
    0, 0, 0, 0, 0,        // first and last word, rivals of the same type, share removed
    1, 1,                 // the same in other tables
    0, 0, 0, 0, 0,        // other columns, style, length
    0, 0, 0, 0, 0, 0, 0, 0, 0, // position
];

/// Words that say little about what a column holds.
const WEAK_WORDS: [&str; 12] = ["id", "at", "is", "has", "by", "of", "date", "type", "name", "the", "to", "in"];

fn flag(value: bool) -> f64 {
    f64::from(u8::from(value))
}

/// A default that says nothing.
fn is_plain(default: &str) -> bool {
    matches!(default, "" | "none" | "null")
}

/// What other tables of the same comparison show.
#[derive(Default)]
struct Event<'a> {
    /// Groups in which the same words were replaced by the same others.
    replaced: HashMap<(String, String), BTreeSet<&'a str>>,
    /// Groups that have the very same pair of names.
    same: HashMap<(&'a str, &'a str), BTreeSet<&'a str>>,
}

/// One table's comparison.
struct Group<'a> {
    words: &'a HashMap<&'a str, Vec<String>>,
    olds: BTreeMap<&'a str, &'a Side>,
    news: BTreeMap<&'a str, &'a Side>,
    kept: Vec<Vec<String>>,
    /// Words by how many names have them.
    frequency: HashMap<String, f64>,
    names: f64,
}

impl<'a> Group<'a> {
    fn new(words: &'a HashMap<&'a str, Vec<String>>, members: &[&'a Pair]) -> Self {
        let olds: BTreeMap<&str, &Side> = members.iter().map(|pair| (pair.old.name.as_str(), &pair.old)).collect();
        let news: BTreeMap<&str, &Side> = members.iter().map(|pair| (pair.new.name.as_str(), &pair.new)).collect();
        let kept: Vec<Vec<String>> = members.first().map_or(vec![], |pair| pair.kept.iter().map(|name| tokens(name)).collect());
        let mut group = Group { words, olds, news, kept, frequency: HashMap::new(), names: 0.0 };
        let lists = group.olds.keys().chain(group.news.keys()).filter_map(|name| words.get(name)).chain(&group.kept);
        for list in lists {
            group.names += 1.0;
            for word in list.iter().collect::<BTreeSet<_>>() {
                *group.frequency.entry(word.clone()).or_default() += 1.0;
            }
        }
        group
    }

    fn words(&self, name: &str) -> &'a [String] {
        self.words.get(name).map_or(&[], Vec::as_slice)
    }

    /// A word that many names have decides little.
    fn weight(&self, word: &str) -> f64 {
        let seen = self.frequency.get(word).copied().unwrap_or(1.0);
        let weight = ((self.names + 2.0) / (seen + 0.5)).ln().max(0.1);
        if WEAK_WORDS.contains(&word) { weight / 2.0 } else { weight }
    }

    fn overlap(&self, a: &[String], b: &[String]) -> (f64, f64) {
        soft_overlap(a, b, &|word| self.weight(word))
    }

    /// Trigrams, letters, words, contained words, and all with the type.
    fn similarities(&self, pair: &Pair) -> [f64; 5] {
        let (old, new) = (&pair.old, &pair.new);
        let (words, contained) = self.overlap(self.words(&old.name), self.words(&new.name));
        let (trigrams, letters) = (trigram(&old.name, &new.name), levenshtein_ratio(&old.name, &new.name));
        let types = match (old.type_name == new.type_name, type_class(&old.type_name) == type_class(&new.type_name)) {
            (true, _) => 1.0,
            (false, true) => 0.6,
            (false, false) => 0.0,
        };
        let all = 0.5 * words + 0.5 * letters.max(trigrams) + 0.5 * types + 0.1 * flag(old.not_null == new.not_null);
        [trigrams, letters, words, contained, all]
    }

    /// How many columns that stayed stand before it.
    fn kept_before(sides: &BTreeMap<&str, &Side>, ordinal: f64) -> f64 {
        ordinal - sides.values().filter(|side| side.ordinal < ordinal).count() as f64
    }

    fn features(&self, pair: &Pair, similarity: &[f64; 5], margins: &Margins<'_, 5>, event: &Event<'_>) -> Vec<f64> {
        let (old, new) = (&pair.old, &pair.new);
        let (old_words, new_words) = (self.words(&old.name), self.words(&new.name));
        let class = type_class(&old.type_name);
        let new_class = type_class(&new.type_name);
        let same_type = old.type_name == new.type_name;
        let of_class =
            |sides: &BTreeMap<&str, &Side>, class: &str| sides.values().filter(|side| type_class(&side.type_name) == class).count() as f64;
        let (rivals_old, rivals_new) = (of_class(&self.olds, class), of_class(&self.news, new_class));
        let like_kept = |words: &[String]| self.kept.iter().map(|kept| self.overlap(words, kept).0).fold(0.0, f64::max);
        let tables = |found: Option<&BTreeSet<&str>>| (found.map_or(1, BTreeSet::len).max(1) as f64).ln();
        let (removed, added) = pair.counts;
        let longer = new_words.len() as f64 - old_words.len() as f64;
        let mut features = vec![
            similarity[0],
            similarity[1],
            jaro_winkler(&old.name, &new.name),
            similarity[2],
            similarity[3],
            flag(same_type),
            flag(class == new_class),
            flag(same_type && !matches!(class, "text" | "int" | "bool" | "ts")),
            flag(old.not_null == new.not_null),
            flag(!old.not_null && new.not_null),
            flag(!old.references.is_empty() && old.references == new.references),
            flag(old.references.is_empty() != new.references.is_empty()),
            flag(old.default == new.default && !is_plain(&old.default)),
            flag(old.default != new.default && !(is_plain(&old.default) && is_plain(&new.default))),
            margins.of(pair, 0, similarity[0]),
            margins.of(pair, 1, similarity[1]),
            margins.of(pair, 2, similarity[2]),
            margins.of(pair, 4, similarity[4]),
            (removed * added).max(1.0).ln(),
            flag(removed <= 1.0 && added <= 1.0),
            (removed - added).abs().min(6.0) / 6.0,
            flag(removed == added),
            flag(old_words.last() == new_words.last()),
            flag(old_words.first() == new_words.first()),
            flag(class == new_class && rivals_old == 1.0 && rivals_new == 1.0),
            (rivals_old * rivals_new).max(1.0).ln(),
            (removed / old.width.max(1.0)).min(1.0),
            tables(event.replaced.get(&replaced_words(old_words, new_words))),
            tables(event.same.get(&(old.name.as_str(), new.name.as_str()))),
            like_kept(new_words) - similarity[2],
            like_kept(old_words) - similarity[2],
            flag(is_camel(&old.name) || is_camel(&new.name)),
            longer.abs().min(4.0),
            longer.clamp(-3.0, 3.0),
        ];
        let (before_old, before_new) = (Self::kept_before(&self.olds, old.ordinal), Self::kept_before(&self.news, new.ordinal));
        let at_end = before_new >= (new.width - added).max(0.0);
        let moved = new.ordinal - old.ordinal;
        features.extend([
            (old.ordinal / old.width.max(1.0) - new.ordinal / new.width.max(1.0)).abs(),
            flag(moved == 0.0),
            flag(moved.abs() <= 1.0),
            flag(moved > 3.0),
            flag(before_old == before_new),
            (before_old - before_new).abs().min(10.0),
            flag(at_end),
            // added behind everything that stayed, while the old one stood among it: a drop and an add
            flag(at_end && before_old < before_new),
            flag(!at_end && before_old == before_new),
        ]);
        features
    }
}

/// Features of all pairs, those of the position last; rivals are looked for inside each group.
pub fn features(pairs: &[Pair]) -> Vec<Vec<f64>> {
    let words: HashMap<&str, Vec<String>> =
        pairs.iter().flat_map(|pair| [pair.old.name.as_str(), pair.new.name.as_str()]).map(|name| (name, tokens(name))).collect();
    let mut events: HashMap<&str, Event<'_>> = HashMap::new();
    for pair in pairs {
        let event = events.entry(&pair.event).or_default();
        event.same.entry((&pair.old.name, &pair.new.name)).or_default().insert(&pair.group);
        if let (Some(old), Some(new)) = (words.get(pair.old.name.as_str()), words.get(pair.new.name.as_str()))
            && old.iter().any(|word| new.contains(word))
        {
            event.replaced.entry(replaced_words(old, new)).or_default().insert(&pair.group);
        }
    }
    let nothing = Event::default();
    let mut result = vec![Vec::new(); pairs.len()];
    for members in groups(pairs).into_values() {
        let of_group: Vec<&Pair> = members.iter().map(|at| &pairs[*at]).collect();
        let group = Group::new(&words, &of_group);
        let similarities: Vec<[f64; 5]> = of_group.iter().map(|pair| group.similarities(pair)).collect();
        let margins = Margins::new(of_group.iter().copied().zip(&similarities));
        for ((at, pair), similarity) in members.iter().zip(&of_group).zip(&similarities) {
            result[*at] = group.features(pair, similarity, &margins, events.get(pair.event.as_str()).unwrap_or(&nothing));
        }
    }
    result
}
