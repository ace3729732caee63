"""The gateway's routes, one router per resource. `app` puts them together."""
