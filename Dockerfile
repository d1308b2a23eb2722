# Build the wheel apart, so that no build tool is in the image that runs.
FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY stickyproxy stickyproxy
RUN python -m venv /opt/stickyproxy && /opt/stickyproxy/bin/pip install --no-cache-dir .

FROM python:3.13-slim
RUN groupadd --system --gid 10001 stickyproxy \
  && useradd --system --uid 10001 --gid 10001 --home-dir /var/lib/stickyproxy --no-create-home stickyproxy \
  && install --directory --mode 0700 --owner 10001 --group 10001 /var/lib/stickyproxy /run/stickyproxy
COPY --from=build /opt/stickyproxy /opt/stickyproxy
COPY config/stickyproxy.yaml /etc/stickyproxy/stickyproxy.yaml
ENV PATH=/opt/stickyproxy/bin:$PATH PYTHONUNBUFFERED=1
ENV STATE_DIRECTORY=/var/lib/stickyproxy RUNTIME_DIRECTORY=/run/stickyproxy
# By number: Kubernetes' runAsNonRoot takes no name.
USER 10001:10001
# All that it writes to, so that the rest may be read-only: the secret that signs the tokens; the sockets for commands
# and for hand-over, which another container takes over by when it shares the volume.
VOLUME ["/var/lib/stickyproxy", "/run/stickyproxy"]
EXPOSE 8080
# The admin listener stays on the container's loopback, where only this check reaches it.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9090/livez', timeout=2)"]
# Ends in the orderly way: exchanges finish, tunnels get a Close frame.
STOPSIGNAL SIGTERM
ENTRYPOINT ["stickyproxy"]
CMD ["serve", "--config", "/etc/stickyproxy/stickyproxy.yaml", "--listen", ":8080"]
