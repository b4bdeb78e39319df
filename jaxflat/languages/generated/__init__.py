"""Languages that a causal model (a teacher) generates, with exact conditionals by enumeration."""
