"""The dialect: adapter ops, sites, edits of graphs, and their text form."""
