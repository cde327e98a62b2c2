"""The folder for the contest's platform (docs/formats.md, "Submission"): packed, and checked by the contest's rules."""
