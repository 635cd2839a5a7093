"""How does a federation run on several machines?

`layout` says which file is where, `init` writes them (`terms`: the settings; `certificates`, `app_files`, `readme`);
`processes` starts Flower's programs and waits for them; `server_app` is the round loop's place on the server, and
`delivery` is what goes to clients before it. What a client's machine does is `fedpeat/client/site.py`.

To add one more file to what an operator gets: a property of `Deployment`, and a line in `init`.
"""
