"""``train --data``: find, check and convert a user's own data, and write a config for it."""
