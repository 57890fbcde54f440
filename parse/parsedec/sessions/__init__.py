"""Sessions: one request in one model - feed, tree, keep, rewind, fork, judge - and the cache behind it."""
