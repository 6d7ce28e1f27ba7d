//! Words for columns whose name says what is in them: made up, and never of anybody.

use super::model::t1::tokens;

/// What a column's name says about its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Semantic {
    Email,
    FirstName,
    LastName,
    FullName,
    Phone,
    City,
    Country,
    CountryCode,
    Currency,
    Language,
    Url,
    PostalCode,
    Street,
    Company,
    Tier,
    Status,
    Priority,
    Colour,
    Sentence,
    Code,
}

const FIRST: [&str; 16] =
    ["Ada", "Ben", "Chen", "Dana", "Emil", "Fatima", "Grace", "Hugo", "Ines", "Jamal", "Kira", "Lena", "Mateo", "Nora", "Omar", "Priya"];
const LAST: [&str; 16] = [
    "Abe", "Berg", "Costa", "Diaz", "Endo", "Fischer", "Garcia", "Haas", "Ito", "Jensen", "Kaya", "Lopez", "Meyer", "Novak", "Okoye",
    "Park",
];
const CITIES: [&str; 12] = ["Berlin", "Lagos", "Lima", "Lyon", "Osaka", "Porto", "Pune", "Quito", "Riga", "Seoul", "Tallinn", "Utrecht"];
const WORDS: [&str; 16] = [
    "plain", "first", "review", "sample", "later", "order", "check", "simple", "update", "north", "paper", "signal", "garden", "window",
    "stone", "river",
];

impl Semantic {
    /// From the words of a column's name.
    pub fn of(name: &str) -> Option<Self> {
        let words = tokens(name);
        let has = |word: &str| words.iter().any(|other| other == word);
        let last = words.last().map_or("", String::as_str);
        Some(match last {
            "email" | "mail" => Semantic::Email,
            "firstname" | "forename" => Semantic::FirstName,
            "lastname" | "surname" => Semantic::LastName,
            "name" if has("first") || has("given") => Semantic::FirstName,
            "name" if has("last") || has("family") => Semantic::LastName,
            "name" if has("full") || has("display") || has("contact") => Semantic::FullName,
            "phone" | "mobile" | "telephone" | "fax" => Semantic::Phone,
            "city" | "town" => Semantic::City,
            "country" => Semantic::Country,
            "code" if has("country") => Semantic::CountryCode,
            "code" if has("postal") || has("zip") || has("post") => Semantic::PostalCode,
            "zip" | "postcode" | "zipcode" => Semantic::PostalCode,
            "currency" => Semantic::Currency,
            "language" | "locale" | "lang" => Semantic::Language,
            "url" | "link" | "website" | "homepage" => Semantic::Url,
            "street" => Semantic::Street,
            "company" | "organisation" | "organization" => Semantic::Company,
            "tier" | "plan" | "grade" => Semantic::Tier,
            "level" if has("loyalty") || has("membership") => Semantic::Tier,
            "status" | "state" => Semantic::Status,
            "priority" | "severity" | "urgency" => Semantic::Priority,
            "color" | "colour" => Semantic::Colour,
            "description" | "comment" | "note" | "notes" | "summary" | "remark" | "remarks" => Semantic::Sentence,
            "code" | "sku" | "reference" => Semantic::Code,
            _ => return None,
        })
    }

    /// The longest value it makes: it is used only where that fits.
    pub(super) fn longest(self) -> i64 {
        match self {
            Semantic::Email => 40,
            Semantic::Url => 40,
            Semantic::Sentence => 40,
            Semantic::FullName | Semantic::Street | Semantic::Company => 20,
            Semantic::Phone => 15,
            Semantic::CountryCode | Semantic::Language => 2,
            Semantic::Currency => 3,
            Semantic::PostalCode => 5,
            _ => 12,
        }
    }

    pub(super) fn value(self, hash: u64) -> String {
        let pick = |list: &[&str], part: u32| list.get((hash >> part) as usize % list.len().max(1)).copied().unwrap_or("").to_owned();
        match self {
            Semantic::Email => format!("{}.{}{}@example.com", pick(&FIRST, 3).to_lowercase(), pick(&LAST, 11).to_lowercase(), hash >> 40),
            Semantic::FirstName => pick(&FIRST, 3),
            Semantic::LastName => pick(&LAST, 11),
            Semantic::FullName => format!("{} {}", pick(&FIRST, 3), pick(&LAST, 11)),
            Semantic::Phone => format!("+1555{:07}", hash % 10_000_000),
            Semantic::City => pick(&CITIES, 5),
            Semantic::Country => pick(&["Brazil", "Estonia", "France", "Germany", "India", "Japan", "Kenya", "Peru", "Portugal"], 5),
            Semantic::CountryCode => pick(&["BR", "DE", "EE", "FR", "IN", "JP", "KE", "PE", "PT"], 5),
            Semantic::Currency => pick(&["EUR", "USD", "GBP", "JPY", "CHF"], 5),
            Semantic::Language => pick(&["en", "de", "fr", "es", "pt", "ja"], 5),
            Semantic::Url => format!("https://example.com/{}/{:x}", pick(&WORDS, 5), hash >> 40),
            Semantic::PostalCode => format!("{:05}", hash % 100_000),
            Semantic::Street => format!("{} Street {}", pick(&LAST, 9), hash % 200 + 1),
            Semantic::Company => format!("{} {}", pick(&LAST, 9), pick(&["Ltd", "GmbH", "Inc", "SA"], 20)),
            Semantic::Tier => pick(&["standard", "standard", "standard", "silver", "silver", "gold", "gold", "platinum"], 5),
            Semantic::Status => pick(&["active", "active", "active", "pending", "inactive"], 5),
            Semantic::Priority => pick(&["normal", "normal", "normal", "low", "high"], 5),
            Semantic::Colour => pick(&["red", "green", "blue", "black", "white"], 5),
            Semantic::Sentence => format!("{} {} {}", pick(&WORDS, 3), pick(&WORDS, 13), pick(&WORDS, 23)),
            Semantic::Code => format!("{}-{:05}", pick(&["A", "B", "C", "D"], 5), hash % 100_000),
        }
    }
}
