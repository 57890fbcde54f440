"""Speed alone, on real shapes: passes against what a device allows, scripted replays, and all one GPU has to show."""
