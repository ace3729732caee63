"""Webhooks: job events sent to the address that their producer named, signed as Standard Webhooks asks.

`post` makes one request, `sender` takes deliveries from the ledger and tries them until they arrive.
"""
