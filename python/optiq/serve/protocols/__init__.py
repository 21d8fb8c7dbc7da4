"""What clients speak: requests read into plain types, answers written in each protocol's words."""
