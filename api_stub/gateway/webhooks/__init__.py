"""Webhooks: job events sent to the address that their producer named, signed as Standard Webhooks asks.

`target` decides where to, `signature` with which secret, `post` makes one request, `sender` takes deliveries from the
ledger and tries them until they arrive, `rules` is what the settings say.
"""
