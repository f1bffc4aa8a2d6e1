"""The doors of LiteMIL (see the README); each opens the wing of the same concern."""
