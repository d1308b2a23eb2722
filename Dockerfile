# Build the wheel apart, so that no build tool is in the image that runs.
FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY stickyproxy stickyproxy
RUN python -m venv /opt/stickyproxy && /opt/stickyproxy/bin/pip install --no-cache-dir .

FROM python:3.13-slim
RUN useradd --system --uid 10001 --home-dir /var/lib/stickyproxy --create-home stickyproxy
COPY --from=build /opt/stickyproxy /opt/stickyproxy
COPY config/stickyproxy.yaml /etc/stickyproxy/stickyproxy.yaml
ENV PATH=/opt/stickyproxy/bin:$PATH PYTHONUNBUFFERED=1 STATE_DIRECTORY=/var/lib/stickyproxy
USER stickyproxy
VOLUME /var/lib/stickyproxy
EXPOSE 8080
# The admin listener stays on the container's loopback, where only this check reaches it.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9090/livez', timeout=2)"]
# Ends in the orderly way: exchanges finish, tunnels get a Close frame.
STOPSIGNAL SIGTERM
ENTRYPOINT ["stickyproxy"]
CMD ["serve", "--config", "/etc/stickyproxy/stickyproxy.yaml", "--listen", ":8080"]
