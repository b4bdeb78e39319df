"""Languages that a causal model writes: teacher, kept words, conditionals by enumeration."""
