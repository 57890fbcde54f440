"""Text: what a prompt may be, chat templates, and tokens as the text they spell."""
