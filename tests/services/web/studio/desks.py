"""What the page works with, without the page."""

from services.web.backend import Backend
from services.web.metrics import WebMetrics
from services.web.settings import WebSettings
from services.web.studio.desk import Desk
from services.web.waiting import WaitingRoom


def desk_of(settings: WebSettings) -> Desk:
    """Return the desk of a web door with these settings. Close its backend."""
    room = WaitingRoom(settings.wait_seconds, WebMetrics().waiting)
    return Desk(backend=Backend(settings), settings=settings, room=room)
