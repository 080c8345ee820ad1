"""`g3n mcp`: the model as tools of the Model Context Protocol, which agents and editors speak."""
