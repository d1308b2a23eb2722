"""The supervisor: starts everything in order, waits for what it is told, and stops everything in order."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any, Final, Literal

from stickyproxy.affinity.health import HealthEvent
from stickyproxy.control.admin.app import AdminListener, make_app
from stickyproxy.control.admin.auth import admit_same_user, make_guard
from stickyproxy.control.admin.commands import Commands
from stickyproxy.control.balance import Balancer
from stickyproxy.control.certificates import CertificateWatcher, make_upstream_contexts
from stickyproxy.control.fleet import Fleet, Orders
from stickyproxy.control.inheritance import Inheritance, export_counts, open_socket, restore_counts
from stickyproxy.control.messages import write_address
from stickyproxy.control.probe import Prober
from stickyproxy.control.process import count_workers, set_log_level, tune_collector
from stickyproxy.control.readings import Readings
from stickyproxy.control.reload import Reloader, watch_file
from stickyproxy.control.resolver import Resolver
from stickyproxy.control.routing import Routing
from stickyproxy.control.runner.runner import Runner
from stickyproxy.control.runner.socket_directory import remove_dead_directories
from stickyproxy.control.runtime import (
    bind_private,
    control_path,
    hand_over_path,
    remove_dead_sockets,
    runtime_directory,
)
from stickyproxy.control.secret import load_or_make_secret, state_directory
from stickyproxy.control.sockets import Sockets
from stickyproxy.control.systemd import Notifier, Watchdog, match, take_listeners
from stickyproxy.control.takeover import HandOverListener, Predecessor
from stickyproxy.control.upgrade import HELD_SIGNALS, Upgrader, describe, keep_signals_from_threads
from stickyproxy.errors import UsageError
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from stickyproxy.config import Address, Config, ListenerTls, Loaded
    from stickyproxy.control.inheritance import WorkerState
    from stickyproxy.control.worker_link import WorkerLink

logger = logging.getLogger(__name__)

_LEAVING_S: Final = 1.0  # between two looks at whether upstreams that were removed are empty


class Supervisor:
    """One running proxy: the control plane and its workers. `stop` may be called at any time; twice: at once.

    The parts that a reload may replace (`prober`, `resolver`, `certificates`, `admin`) are attributes; whoever needs
    one looks here for it.
    """

    def __init__(
        self, loaded: Loaded, inherited: Inheritance | None = None, predecessor: Predecessor | None = None
    ) -> None:
        if not loaded.config.has_upstreams:
            raise UsageError("no upstreams: name them in the file or as URLs, or the command of an app to run")
        self.loaded = loaded
        self._inherited = inherited
        self._predecessor = predecessor
        self.signing: tuple[bytes, ...] = ()
        """The secrets: the first signs tokens, all verify them."""
        self._is_reload_due = inherited is not None and bool(inherited.counts.get("is_reload_due"))
        self.is_handed_over = False
        """Whether another proxy has taken this one's place."""
        self.notifier = Notifier()
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self.sockets = Sockets()
        self._private: dict[str, tuple[Path, socket.socket]] = {}  # the control and the hand-over socket
        self._hand_over: HandOverListener | None = None
        self.routing: Routing
        self.fleet: Fleet
        self.certificates: CertificateWatcher
        self.resolver: Resolver
        self.prober: Prober
        self.admin: AdminListener | None = None
        self.control: AdminListener | None = None
        self.runner: Runner | None = None
        """The app processes, where the proxy starts them itself."""
        self.readings: Readings
        self.reloader: Reloader
        self.upgrader = Upgrader(self, inherited)

    @property
    def config(self) -> Config:
        """Return the configuration that the proxy works by."""
        return self.loaded.config

    @property
    def addresses(self) -> list[Address]:
        """Return where it listens, once it does; with the ports that the system chose for port 0."""
        return [self.sockets.real_address(one.address) for one in self.config.listeners]

    def stop(self) -> None:
        """Stop in an orderly way; called again: at once."""
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    def on_reload(self) -> None:
        """Reload, on a signal, now or once it can be; the log says what came of it."""
        if self._is_running and not self.upgrader.is_running and not self.is_handing_over:
            spawn(self._reload(), "reload")
        else:
            self._is_reload_due = True

    async def _reload(self) -> None:
        try:
            await self.reloader.reload()
        except UsageError:  # it has been logged
            self._is_reload_due |= self.upgrader.is_running or self.is_handing_over

    def on_free(self) -> None:
        """Reload now, where that had to wait."""
        is_due, self._is_reload_due = self._is_reload_due, False
        if is_due:
            self.on_reload()

    def on_upgrade(self) -> None:
        """Upgrade, on a signal; the log says what came of it."""
        if self._is_running:
            spawn(self._try(self.upgrader.upgrade()), "upgrade")

    @staticmethod
    async def _try(command: Coroutine[Any, Any, object]) -> None:
        with suppress(UsageError):  # it has been logged
            await command

    @property
    def is_stopping(self) -> bool:
        """Say whether it was told to stop."""
        return self._stop.is_set()

    @property
    def is_handing_over(self) -> bool:
        """Say whether another proxy is taking over."""
        return self._hand_over is not None and self._hand_over.is_busy

    @property
    def _is_running(self) -> bool:
        return hasattr(self, "readings") and self.readings.is_ready

    async def run(self, on_ready: Callable[[list[Address]], None] | None = None) -> None:
        """Serve until stopped; raise UsageError, with nothing left running, where it cannot start."""
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self.readings.is_ready = True
            listening = ", ".join(str(one) for one in self.addresses)
            count = len(self.routing.upstreams)
            logger.info("serving %d upstreams on %s", count, listening)
            if on_ready is not None:
                on_ready(self.addresses)
            tune_collector()
            self.on_free()
            self.notifier.ready(f"serving {count} upstreams")
            await self._stop.wait()
            self.readings.is_ready = False
            run = self.config.run
            within_s = self.config.grace_s + (0.0 if run is None else run.stop.timeout_s)
            self.notifier.stopping("finishing what is open", within_s=within_s)
            await self._drain()

    async def _start(self, stack: AsyncExitStack) -> None:
        """Start all parts, each to be ended with the stack."""
        config = self.config
        stack.callback(self.sockets.close_all)
        self._adopt_sockets()
        self.sockets.open(_addresses(config))
        inherited = self._inherited
        self.signing = self._find_secrets()
        self.certificates = CertificateWatcher(_by_position(config), self._renew)
        self.certificates.make_contexts()
        upstream_contexts = make_upstream_contexts(config.every_upstream)
        bound = self.sockets.choose(one.address for one in config.listeners)
        self.fleet = Fleet(Orders(self.loaded, self.signing, bound, count_workers(config)), self._on_report)
        stack.push_async_callback(self.fleet.close)
        if config.run is not None:
            directory = runtime_directory()
            remove_dead_directories(directory)
            self.runner = Runner(self, config.run, directory)
            stack.push_async_callback(self._stop_runner, self.runner)
        self.routing = Routing(config, self.fleet.publish, upstream_contexts)
        if self.runner is not None:
            self.routing.is_retired = self.runner.is_retired
        if inherited is not None:
            self.fleet.adopt(inherited)
            self.routing.restore(inherited.routing)
        elif self._predecessor is not None:
            self.routing.restore(self._predecessor.routing)
        self.resolver = Resolver(self.routing.addresses, config.dns_refresh_s, self.routing.resolve)
        self.prober = Prober(self.routing)
        stack.push_async_callback(self._stop_watching)
        self.readings = Readings(self)
        self.reloader = Reloader(self)
        if inherited is None:
            await asyncio.gather(self.fleet.start(), self.resolver.start())
        else:
            self.reloader.restore(inherited.counts)
            restore_counts(self, inherited.counts)
            await asyncio.gather(self.fleet.learn(), self.resolver.start())
        self.prober.start()
        stack.push_async_callback(self._stop_admin)
        await self._start_admin()
        await self._start_runner()
        if inherited is None:
            await self.fleet.accept()
        if self._predecessor is not None:
            await self._take_over(self._predecessor)
        await self._start_private(stack)
        if inherited is not None:
            await self.upgrader.take_over()
        self._start_looking(stack)

    async def _start_runner(self) -> None:
        """Start the app processes, where there are any, and wait for the first to be ready."""
        if self.runner is None:
            return
        if self._inherited is None:
            await self.runner.start(self._stop)
        else:
            await self.runner.adopt(self._inherited.runner)

    async def _stop_runner(self, runner: Runner) -> None:
        """End the app processes; at once after a second signal."""
        at_once = spawn(self._stop_now.wait(), "second signal")
        at_once.add_done_callback(lambda task: None if task.cancelled() else runner.kill())
        await runner.stop()
        at_once.cancel()

    def _start_looking(self, stack: AsyncExitStack) -> None:
        """Start what looks at something from time to time."""
        self.certificates.start()
        self.readings.loop_lag.start()
        stack.callback(self.readings.loop_lag.stop)
        watchdog = Watchdog(self.notifier, self.readings.is_any_alive)
        watchdog.start()
        stack.push_async_callback(watchdog.stop)
        balancer = Balancer(self.fleet)
        balancer.start()
        stack.callback(balancer.stop)
        self._watch_file(stack)
        stack.callback(spawn(self._watch_leaving(), "upstreams that are leaving").cancel)

    def _watch_file(self, stack: AsyncExitStack) -> None:
        """Reload when the file changes, where the configuration asks for it."""
        path = self.loaded.source.path
        if path is not None:
            watching = spawn(watch_file(path, self._on_file_change), "watch the file")
            stack.callback(watching.cancel)

    async def _on_file_change(self) -> None:
        if self.config.reload_on_change:
            self.on_reload()

    async def apply(self, loaded: Loaded, contexts: dict[str, ssl.SSLContext]) -> None:
        """Work by another configuration; raise UsageError, with nothing changed, where a part cannot.

        `contexts` are those of its upstreams that TLS is spoken to.
        """
        before, config = self.config, loaded.config
        signing = self._find_secrets_after(before, config)
        opened = self.sockets.open(_addresses(config))
        bound = self.sockets.choose(one.address for one in config.listeners)
        orders = Orders(loaded, signing, bound, count_workers(config))
        certificates = CertificateWatcher(_by_position(config), self._renew)
        try:
            certificates.make_contexts()
            await self.fleet.reload(orders, [address for address in opened if address in bound])
        except UsageError:
            self.sockets.close(opened)
            raise
        self.loaded, self.signing = loaded, orders.secrets
        _tell_renamed_cookies(before, config)
        set_log_level(config.log_level)
        self.routing.reload(config, contexts)
        if self.runner is not None and config.run is not None:
            self.runner.apply(config.run)
        await self._replace_certificates(certificates)
        await self._replace_resolver()
        if config.every_cluster != before.every_cluster:
            await self._replace_prober()
        if config.admin != before.admin:
            former, self.admin = self.admin, None
            await self._start_admin()
            if former is not None:
                await former.stop()
        self.sockets.close([address for address in self.sockets if address not in _addresses(config)])
        await self.fleet.published()
        try:
            await self.fleet.resize(config.grace_s)
        except UsageError as error:  # all else has changed by now
            logger.error("there are fewer workers than there should be: %s", error)  # noqa: TRY400 -- the reason is all

    def _find_secrets_after(self, before: Config, config: Config) -> tuple[bytes, ...]:
        """Return the secrets; those in use stay where nothing is said of them, wherever they came from."""
        was = before.affinity.secrets, not before.has_cookie, before.state_directory
        now = config.affinity.secrets, not config.has_cookie, config.state_directory
        return self.signing if was == now else find_secrets(config)

    async def _replace_certificates(self, certificates: CertificateWatcher) -> None:
        former, self.certificates = self.certificates, certificates
        self.certificates.reloads = former.reloads
        self.certificates.start()
        await former.stop()

    async def _replace_resolver(self) -> None:
        former = self.resolver
        self.resolver = Resolver(self.routing.addresses, self.config.dns_refresh_s, self.routing.resolve)
        self.resolver.lookups = former.lookups
        await former.stop()
        await self.resolver.start()

    async def _replace_prober(self) -> None:
        """Probe by other settings, or other upstreams; those that are leaving are still probed."""
        former = self.prober
        self.prober = Prober(self.routing, former.counters)
        await former.stop()
        self.prober.start()

    async def _watch_leaving(self) -> None:
        """Remove the upstreams that a reload took out of the configuration, once they are empty or gone."""
        while True:
            await asyncio.sleep(_LEAVING_S)
            if self.routing.leaving:
                self.routing.drop([one for one in self.routing.leaving if self.readings.is_empty(one)])

    async def _start_admin(self) -> None:
        written = self.config.admin
        if written is not None:
            self.admin = AdminListener(make_app(make_guard(written), self.readings, self.routing, self.fleet.published))
            await self.admin.start(self.sockets[written.address])

    async def _stop_watching(self) -> None:
        """Look at upstreams, their names and at certificates no more; these parts may be others than at the start."""
        for part in (self.certificates, self.prober, self.resolver):
            await part.stop()

    async def _stop_admin(self) -> None:
        admin, self.admin = self.admin, None
        if admin is not None:
            await admin.stop()

    def _adopt_sockets(self) -> None:
        """Take the sockets that a former image, another proxy or the service manager has left."""
        addresses = _addresses(self.config)
        if self._inherited is not None:
            links = {address: open_socket(at) for address, at in self._inherited.sockets.items()}
            lent = {address: links.pop(address) for address in self._inherited.lent}
            self.sockets.adopt(links)
            self.sockets.adopt(lent, is_lent=True)
            return
        if self._predecessor is not None:
            # The files of Unix sockets are the other proxy's until it has handed over.
            self.sockets.adopt(self._predecessor.choose_sockets(addresses), is_lent=True)
        wanted = [address for address in addresses if address not in self.sockets]
        self.sockets.adopt(match(wanted, take_listeners()), is_lent=True)

    def _find_secrets(self) -> tuple[bytes, ...]:
        """Return the secrets; with those of another proxy whose place is taken, so that its clients keep their pins."""
        if self._inherited is not None:
            return self._inherited.secrets
        if self._predecessor is None:
            return find_secrets(self.config)
        theirs = self._predecessor.secrets
        if not self.config.affinity.secrets:
            return theirs
        return tuple(dict.fromkeys((*self.config.affinity.secrets, *theirs)))

    async def _take_over(self, predecessor: Predecessor) -> None:
        counts = await predecessor.hand_over(self.fleet, self.config.grace_s)
        self.sockets.adopt(predecessor.sockets)
        status = {"grace_s": self.config.grace_s, **counts}
        logger.info("took over from a proxy of version %s: %s", predecessor.version, describe(status))

    async def hand_over_done(self) -> None:
        """Leave the place to another proxy, which has all that can move; what cannot ends here, and then this does."""
        self.is_handed_over = True
        self.readings.is_ready = False
        self.sockets.disown()
        await self._stop_admin()
        if self.control is not None:
            await self.control.stop()
        self._close_private()
        logger.info("another proxy has taken over: this one ends once its last connections have")
        spawn(self._end_handed_over(), "end after the hand-over")

    async def _end_handed_over(self) -> None:
        await self.fleet.gone()
        self.stop()

    async def _start_private(self, stack: AsyncExitStack) -> None:
        """Listen for commands, and for a proxy that takes over."""
        stack.callback(self._close_private)
        if None in {self.config.control, self.config.hand_over}:
            with suppress(UsageError):  # it is told where the sockets are made
                remove_dead_sockets(runtime_directory())
        link = self._open_private("control", self.config.control, control_path)
        if link is not None:
            app = make_app(admit_same_user, self.readings, self.routing, self.fleet.published)
            Commands(self).add_routes(app.router)
            self.control = AdminListener(app)
            stack.push_async_callback(self.control.stop)
            await self.control.start(link)
        link = self._open_private("hand_over", self.config.hand_over, hand_over_path)
        if link is not None:
            self._hand_over = HandOverListener(self, link)

    def _open_private(
        self, name: str, written: Path | Literal[False] | None, find_path: Callable[[int], Path]
    ) -> socket.socket | None:
        """Return a listening socket for this user alone; None where there is to be none, or the default cannot be."""
        if written is False:
            return None
        try:
            path = written or find_path(os.getpid())
            left = None if self._inherited is None else self._inherited.private.get(name)
            link = bind_private(path) if left is None else open_socket(left)
        except UsageError as error:
            if written is not None:
                raise
            logger.warning("the proxy goes on without its %s socket: %s", name.replace("_", "-"), error)
            return None
        self._private[name] = path, link
        return link

    def _close_private(self) -> None:
        """Take no commands and no successor any more; once, as the paths may be another proxy's by the second time."""
        private, self._private = self._private, {}
        if self._hand_over is not None and private:
            self._hand_over.close()
        for path, link in private.values():
            link.close()
            path.unlink(missing_ok=True)

    def export(self, *, serving: tuple[WorkerState, ...] = (), leaving: tuple[WorkerState, ...] = ()) -> Inheritance:
        """Return what another image of this process needs to go on."""
        return Inheritance(
            loaded=self.loaded,
            secrets=self.signing,
            sockets={address: self.sockets[address].fileno() for address in self.sockets},
            lent=tuple(self.sockets.lent),
            private={name: link.fileno() for name, (_, link) in self._private.items()},
            board=None if self.fleet.next_board is None else self.fleet.next_board.descriptor,
            keys=self.fleet.keys.descriptor,
            routing=self.routing.export(),
            totals=self.fleet.totals.to_json(),
            counts={
                "restarts": self.fleet.restarts,
                "removed": self.fleet.removed.to_json(asyncio.get_running_loop().time()),
                "is_reload_due": self._is_reload_due,
                **export_counts(self),
                **self.reloader.export(),
                **self.upgrader.export(),
            },
            serving=serving,
            leaving=leaving,
        )

    async def leave(self, successors: list[WorkerLink]) -> Inheritance:
        """End all that runs in this image, but for what another one goes on with, and return that."""
        self.readings.loop_lag.stop()
        await self._stop_watching()
        await self._stop_admin()
        if self.control is not None:
            await self.control.stop()
        if self._hand_over is not None:
            self._hand_over.close()
        serving, leaving = await self.fleet.leave(successors)
        inheritance = self.export(serving=serving, leaving=leaving)
        if self.runner is not None:
            inheritance.runner = self.runner.leave()
        return inheritance

    def _on_report(self, upstream_id: str, event: str) -> None:
        self.routing.report(upstream_id, HealthEvent(event))

    async def _renew(self, position: int, _: ssl.SSLContext) -> None:
        """Let the workers take renewed certificates of a listener; the context shows that they can be used."""
        address = self.config.listeners[position].address
        for answer in await self.fleet.ask_all("renew", {"address": write_address(address)}):
            if isinstance(answer, Exception):
                raise answer

    async def _drain(self) -> None:
        """Let the workers finish what they have, until the grace period is over or the second signal comes."""
        grace_s = self.config.grace_s
        connections, tunnels = self.fleet.count_open()
        logger.info(
            "stopping: %d connections and %d tunnels are open, and have %g s to end", connections, tunnels, grace_s
        )
        draining = spawn(self.fleet.drain(grace_s), "drain")
        await asyncio.sleep(0)  # the workers are told; from here on who connects is refused, and does not wait in vain
        self.sockets.close([one.address for one in self.config.listeners])
        at_once = spawn(self._stop_now.wait(), "second signal")
        await asyncio.wait((draining, at_once), return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, at_once):
            task.cancel()


def find_secrets(config: Config) -> tuple[bytes, ...]:
    """Return what signs the tokens: as the file says, else one that is kept; none is needed without a cookie."""
    if config.affinity.secrets:
        return config.affinity.secrets
    if not config.has_cookie:
        return (secrets.token_bytes(32),)
    return (load_or_make_secret(state_directory(config.state_directory)),)


def _tell_renamed_cookies(before: Config, config: Config) -> None:
    """Say of which clusters the affinity cookie has another name although the file says nothing of it."""
    names = {one.name: before.name_cookie(one) for one in before.every_cluster if one.affinity.cookie is not None}
    for one in config.every_cluster:
        cookie, was = one.affinity.cookie, names.get(one.name)
        if cookie is not None and cookie.name is None and was is not None and was != config.name_cookie(one):
            logger.warning(
                "the affinity cookie %s is called %s from now on, and clients are placed anew; to keep the name, set "
                "cookie.name in affinity of the cluster %s", was, config.name_cookie(one), one.name,
            )  # fmt: skip


def _by_position(config: Config) -> dict[int, ListenerTls]:
    return {position: one.tls for position, one in enumerate(config.listeners) if one.tls is not None}


def _addresses(config: Config) -> list[Address]:
    """Return all addresses that are bound; raise UsageError where two would share a socket, and so their clients."""
    admin = [] if config.admin is None else [config.admin.address]
    listeners = [one.address for one in config.listeners]
    for address in admin:
        if address in listeners:
            raise UsageError(f"cannot listen on {address}: the address is in use by a listener; admin needs its own")
    return [*listeners, *admin]


async def serve(
    loaded: Loaded,
    on_ready: Callable[[list[Address]], None] | None = None,
    inherited: Inheritance | None = None,
    take_over: Path | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, a second one stops at once; reload on SIGHUP, upgrade on SIGUSR2.

    `take_over` is the hand-over socket of the proxy whose place it takes. Raises UsageError where it cannot start.
    """
    await keep_signals_from_threads()
    predecessor = None if take_over is None else await Predecessor.find(take_over)
    if take_over is not None and predecessor is None:
        logger.warning("nobody listens at %s: there is nobody to take over from", take_over)
    supervisor = Supervisor(loaded, inherited, predecessor)
    loop = asyncio.get_running_loop()
    handlers = {
        signal.SIGTERM: supervisor.stop,
        signal.SIGINT: supervisor.stop,
        signal.SIGHUP: supervisor.on_reload,
        signal.SIGUSR2: supervisor.on_upgrade,
    }
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
    try:
        await supervisor.run(on_ready)
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
