"""`g3n history`: the conversations that `g3n chat` keeps, to list, read, search and remove."""
