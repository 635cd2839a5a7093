"""Words of the library that a client's light processes need too; there, they come with torch."""

SITE = "site"
"""The key of Flower's node config that holds the path of `site.json`; as in `fedpeat.client.site`."""

SITE_FILE = "site.json"
"""As in `fedpeat.client.site`."""

FILES = ("text", "jsonl", "csv", "parquet")
"""Kinds of data that are files; as in `fedpeat.client.site`."""

REFUSED = 100
"""Error code of a reply from a client that could not do its job; as in `fedpeat.wire`."""
