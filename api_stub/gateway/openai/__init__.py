"""The same queue for programs that speak OpenAI's API: chat completions, models, files and batches.

`routes` has the addresses, `chat` makes jobs of requests, `completions` answers of results, `runner` works off batches.
"""
