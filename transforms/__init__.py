"""What happens to rows: each a small part, usable alone in any Beam pipeline."""
