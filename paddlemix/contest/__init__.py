"""The folder for the contest's platform (SPEC §3): packed, and held against the contest's rules."""
