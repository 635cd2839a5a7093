"""How does a federation run on several machines?

`layout` says which file is where, `init` writes them (`terms`: the settings; `certificates`, `app_files`, `readme`);
`processes` starts Flower's programs and waits for them (`handshake`: is it our server?), and `operating` is Flower's
command line. `superlink` is the server's program, which lets other machines do little, and hands out again what a
client lost (`redelivery`). `server_app` is the round loop's place on the server, and `delivery` is what goes to clients
before it. `scrape` serves a run's numbers to Prometheus, as `tally` reads them; `joining` is a client from Python. What
a client's machine does is `fedpeat/client/site.py`.

On that machine, Flower's process for a message is a `relay` to the client's resident `worker`: over a `local_socket`,
by `frames`. `resident` keeps the worker running, `tether` ends it and Flower's program (`supernode`) with the command,
and `names` are words that are needed where torch is not loaded: in the command, in the relay.

To add one more file to what an operator gets: a property of `Deployment`, and a line in `init`.
"""
