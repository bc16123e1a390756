"""The Dynamo backend: one captured graph through the passes to a compiler."""
