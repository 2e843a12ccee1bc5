"""Records from files, folders and tables: one record type, whatever the layout."""
