"""A Streamlit page: a count, an upload and a download, in the memory of the process that has the session."""

import os

import streamlit as st

PROCESS = os.environ.get("STICKYPROXY_UPSTREAM", "the only process")  # such as g1-2

st.session_state.setdefault("count", 0)
if st.button("Count"):
    st.session_state.count += 1
counted = f"{st.session_state.count} counted by {PROCESS}"
st.text(counted)

file = st.file_uploader("A file")
if file is not None:
    st.text(f"{file.size} bytes uploaded to {PROCESS}")

st.download_button("Download", f"{counted}\n", file_name="report.txt", on_click="ignore")
