"""Models: where they are found and how they are loaded, what is known of each, and who may run one when."""
