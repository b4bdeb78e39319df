"""Context-free grammars: files, random ones, exact sampling and exact conditionals."""
