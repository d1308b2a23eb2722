"""A Panel page: a count, in the memory of the process that made the page."""

import os

import panel as pn

PROCESS = os.environ.get("STICKYPROXY_UPSTREAM", "the only process")  # such as g1-2

pn.extension(reconnect=True)  # after a cut the page goes on with its session

button = pn.widgets.Button(name="Count")
counted = pn.bind("{} counted by {}".format, button.param.clicks, PROCESS)
pn.Column("# Count", button, counted).servable(title="Count")
