//! libpg_query's parse tree as one small generic tree, so that a walk over it is complete by construction: the crate's
//! own iterators leave node types out. Made by a serde `Serializer` (every protobuf struct derives `Serialize`); default
//! values (0, false, "", none) and literals' texts are dropped.

use serde::{Serialize, ser};
use std::fmt;

/// A value of the parse tree.
#[derive(Debug, Default)]
pub(super) enum Tree {
    /// A default value, or one that nobody asks for.
    #[default]
    Empty,
    /// A number, an enumeration value or `true`.
    Int(i64),
    /// A name.
    Text(String),
    /// A repeated field.
    List(Vec<Tree>),
    /// A message: its type's name and its fields that are not default.
    Struct(&'static str, Vec<(&'static str, Tree)>),
}

impl Tree {
    /// Builds the tree of any message.
    pub fn of(message: &impl Serialize) -> Option<Tree> {
        message.serialize(Builder { places: false }).ok()
    }

    /// The same with the byte offsets (`location`) of what has one.
    pub fn with_places(message: &impl Serialize) -> Option<Tree> {
        message.serialize(Builder { places: true }).ok()
    }

    /// The name of a message's type.
    pub fn name(&self) -> &'static str {
        if let Tree::Struct(name, _) = self { name } else { "" }
    }

    /// A field, or `Empty`.
    pub fn get(&self, field: &str) -> &Tree {
        const EMPTY: &Tree = &Tree::Empty;
        let Tree::Struct(_, fields) = self else { return EMPTY };
        fields.iter().find(|(name, _)| *name == field).map_or(EMPTY, |(_, value)| value)
    }

    pub fn is_empty(&self) -> bool {
        matches!(self, Tree::Empty)
    }

    pub fn int(&self) -> i64 {
        if let Tree::Int(value) = self { *value } else { 0 }
    }

    pub fn text(&self) -> &str {
        if let Tree::Text(text) = self { text } else { "" }
    }

    pub fn items(&self) -> &[Tree] {
        if let Tree::List(items) = self { items } else { &[] }
    }

    /// The string of a `String` node.
    pub fn string(&self) -> &str {
        self.get("sval").text()
    }

    /// The last string of a list of `String` nodes: a qualified name without its qualification.
    pub fn last_string(&self) -> &str {
        self.items().last().map_or("", Tree::string)
    }
}

#[derive(Debug)]
pub(super) struct Unsupported;

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value that no parse tree contains")
    }
}

impl std::error::Error for Unsupported {}

impl ser::Error for Unsupported {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Unsupported
    }
}

#[derive(Clone, Copy)]
struct Builder {
    places: bool,
}

struct ListBuilder(Vec<Tree>, Builder);

struct StructBuilder(&'static str, Vec<(&'static str, Tree)>, Builder);

macro_rules! integers {
    ($($method:ident $type:ty),*) => {$(
        fn $method(self, value: $type) -> Result<Tree, Unsupported> {
            Ok(if value == <$type>::default() { Tree::Empty } else { Tree::Int(value as i64) })
        }
    )*};
}

impl ser::Serializer for Builder {
    type Ok = Tree;
    type Error = Unsupported;
    type SerializeSeq = ListBuilder;
    type SerializeTuple = ser::Impossible<Tree, Unsupported>;
    type SerializeTupleStruct = ser::Impossible<Tree, Unsupported>;
    type SerializeTupleVariant = ser::Impossible<Tree, Unsupported>;
    type SerializeMap = ser::Impossible<Tree, Unsupported>;
    type SerializeStruct = StructBuilder;
    type SerializeStructVariant = ser::Impossible<Tree, Unsupported>;

    integers!(serialize_bool bool, serialize_i8 i8, serialize_i16 i16, serialize_i32 i32, serialize_i64 i64,
        serialize_u8 u8, serialize_u16 u16, serialize_u32 u32, serialize_u64 u64);

    fn serialize_f32(self, _: f32) -> Result<Tree, Unsupported> {
        Ok(Tree::Empty)
    }
    fn serialize_f64(self, _: f64) -> Result<Tree, Unsupported> {
        Ok(Tree::Empty)
    }
    fn serialize_char(self, _: char) -> Result<Tree, Unsupported> {
        Ok(Tree::Empty)
    }
    fn serialize_str(self, text: &str) -> Result<Tree, Unsupported> {
        Ok(if text.is_empty() { Tree::Empty } else { Tree::Text(text.to_owned()) })
    }
    fn serialize_bytes(self, _: &[u8]) -> Result<Tree, Unsupported> {
        Ok(Tree::Empty)
    }
    fn serialize_none(self) -> Result<Tree, Unsupported> {
        Ok(Tree::Empty)
    }
    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Tree, Unsupported> {
        value.serialize(self)
    }
    fn serialize_unit(self) -> Result<Tree, Unsupported> {
        Ok(Tree::Empty)
    }
    fn serialize_unit_struct(self, name: &'static str) -> Result<Tree, Unsupported> {
        Ok(Tree::Struct(name, Vec::new()))
    }
    fn serialize_unit_variant(self, _: &'static str, index: u32, _: &'static str) -> Result<Tree, Unsupported> {
        Ok(Tree::Int(i64::from(index)))
    }
    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Result<Tree, Unsupported> {
        value.serialize(self)
    }
    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<Tree, Unsupported> {
        // Literals: only numbers and booleans are asked for (`BEGIN READ ONLY` holds one).
        if name == "Val" && matches!(variant, "Sval" | "Fval" | "Bsval") {
            return Ok(Tree::Empty);
        }
        value.serialize(self)
    }
    fn serialize_seq(self, length: Option<usize>) -> Result<ListBuilder, Unsupported> {
        Ok(ListBuilder(Vec::with_capacity(length.unwrap_or(0)), self))
    }
    fn serialize_tuple(self, _: usize) -> Result<Self::SerializeTuple, Unsupported> {
        Err(Unsupported)
    }
    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Self::SerializeTupleStruct, Unsupported> {
        Err(Unsupported)
    }
    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeTupleVariant, Unsupported> {
        Err(Unsupported)
    }
    fn serialize_map(self, _: Option<usize>) -> Result<Self::SerializeMap, Unsupported> {
        Err(Unsupported)
    }
    fn serialize_struct(self, name: &'static str, _: usize) -> Result<StructBuilder, Unsupported> {
        Ok(StructBuilder(name, Vec::new(), self))
    }
    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeStructVariant, Unsupported> {
        Err(Unsupported)
    }
}

impl ser::SerializeSeq for ListBuilder {
    type Ok = Tree;
    type Error = Unsupported;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Unsupported> {
        self.0.push(value.serialize(self.1)?);
        Ok(())
    }
    fn end(self) -> Result<Tree, Unsupported> {
        Ok(if self.0.is_empty() { Tree::Empty } else { Tree::List(self.0) })
    }
}

impl ser::SerializeStruct for StructBuilder {
    type Ok = Tree;
    type Error = Unsupported;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, field: &'static str, value: &T) -> Result<(), Unsupported> {
        if matches!(field, "stmt_location" | "stmt_len") || (field == "location" && !self.2.places) {
            return Ok(());
        }
        let value = value.serialize(self.2)?;
        if !value.is_empty() {
            self.1.push((field, value));
        }
        Ok(())
    }
    fn end(mut self) -> Result<Tree, Unsupported> {
        // `Node` is only the envelope of what it holds.
        if self.0 == "Node" {
            return Ok(self.1.pop().map_or(Tree::Empty, |(_, inner)| inner));
        }
        Ok(Tree::Struct(self.0, self.1))
    }
}
