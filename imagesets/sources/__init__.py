"""Where images come from: folders, zips, and archives of arrays."""
