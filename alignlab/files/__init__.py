"""Files that may come from somebody else or break: bounded reading, checksums, links, locks."""
