"""Languages that a causal model generates: its training, its words, conditionals by enumeration."""
