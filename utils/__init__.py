"""LiteMIL: the modules here are public (see the README); the folders hold what they are made of."""
