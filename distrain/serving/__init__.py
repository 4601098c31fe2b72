"""Parameters on servers: frames over sockets, shards, the server, and the worker's side of it."""
