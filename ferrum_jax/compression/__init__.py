"""What a smaller cache should hold: which tokens stay, and what they become."""
