"""The judgments: whose cache goes when room is short, and when that is worth a word."""
