"""A recipe becomes a trainer: it is read, validated, built."""
