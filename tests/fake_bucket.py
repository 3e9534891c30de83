"""A server that speaks as much of Google Cloud Storage as runs need.

In memory, on this machine, without accounts: objects are put, got, listed,
copied and deleted over the JSON API, which is what gcsfs, Google's own client
and tensorstore talk. Not: permissions, retries, folders (hierarchical
namespace), errors of a real bucket.
"""

import collections
import contextlib
import hashlib
import itertools
import json
import re
import threading
import urllib.parse
from base64 import b64encode
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKET = "bucket"


class FakeBucket:
  """The server; a context manager.

  Attributes:
    objects: {name: bytes}.
    requests: how often each kind of request came.
  """

  def __init__(self):
    self.objects = {}
    self.requests = collections.Counter()
    self.generations = {}
    self._numbers = itertools.count(1)
    self._uploads = {}
    self._lock = threading.RLock()
    handler = type("Handler", (_Handler,), {"bucket": self})
    self._server = ThreadingHTTPServer(("localhost", 0), handler)
    self.url = f"http://localhost:{self._server.server_address[1]}"

  def __enter__(self):
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *exception):
    self._server.shutdown()
    self._server.server_close()

  @property
  def environment(self):
    """Variables with which a process takes this for Google's."""
    return {
      "STORAGE_EMULATOR_HOST": self.url,
      "TENSORSTORE_GCS_HTTP_URL": self.url,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
      "GOOGLE_CLOUD_PROJECT": "project",
      "NO_GCE_CHECK": "true",
      # It would ask what kind of bucket this is, over gRPC.
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }

  def put(self, name, content):
    with self._lock:
      self.objects[name] = bytes(content)
      self.generations[name] = next(self._numbers)
      return self.describe(name)

  def delete(self, name):
    with self._lock:
      del self.objects[name], self.generations[name]

  def describe(self, name):
    content = self.objects[name]
    generation = str(self.generations[name])
    quoted = urllib.parse.quote(name, safe="")
    return {
      "kind": "storage#object",
      "name": name,
      "id": f"{BUCKET}/{name}/{generation}",
      "bucket": BUCKET,
      "generation": generation,
      "metageneration": "1",
      "contentType": "application/octet-stream",
      "size": str(len(content)),
      "md5Hash": b64encode(hashlib.md5(content).digest()).decode(),
      "timeCreated": "2026-01-01T00:00:00.000Z",
      "updated": "2026-01-01T00:00:00.000Z",
      "mediaLink": f"{self.url}/download/storage/v1/b/{BUCKET}/o/{quoted}"
      "?alt=media",
    }

  def refuses(self, name, query):
    """Whether a precondition on the object's generation does not hold."""
    wanted = query.get("ifGenerationMatch")
    return wanted is not None and int(wanted) != self.generations.get(name, 0)

  def begin_upload(self, name):
    with self._lock:
      number = str(next(self._numbers))
      self._uploads[number] = (name, bytearray())
      return number

  def upload(self, number, content):
    name, received = self._uploads[number]
    received += content
    return name, received


class _Handler(BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  bucket: FakeBucket

  def log_message(self, *arguments):
    pass

  def do_GET(self):
    path, query = self._address()
    self.bucket.requests["get"] += 1
    if path.split("/b/")[1].split("/")[0] != BUCKET:
      return self._refuse(404)
    if re.fullmatch(r"/storage/v1/b/[^/]+", path):
      return self._json({"kind": "storage#bucket", "name": BUCKET})
    if re.fullmatch(r"/storage/v1/b/[^/]+/o", path):
      return self._json(self._listing(query))
    name = self._name(path)
    if name not in self.bucket.objects:
      return self._refuse(404)
    if query.get("alt") != "media":
      return self._json(self.bucket.describe(name))
    return self._media(name)

  do_HEAD = do_GET

  def do_DELETE(self):
    self.bucket.requests["delete"] += 1
    path, query = self._address()
    name = self._name(path)
    if name not in self.bucket.objects:
      return self._refuse(404)
    if self.bucket.refuses(name, query):
      return self._refuse(412)
    self.bucket.delete(name)
    return self._send(204, b"")

  def do_POST(self):
    self.bucket.requests["post"] += 1
    path, query = self._address()
    if "upload_id" in query:
      return self._part(query["upload_id"])  # So gcsfs; Google's with PUT.
    body = self._body()
    if "/b/" in path and path.split("/b/")[1].split("/")[0] != BUCKET:
      return self._refuse(404)
    if copied := re.fullmatch(
      r"/storage/v1/b/[^/]+/o/(.+)/(?:copyTo|rewriteTo)/b/[^/]+/o/(.+)", path
    ):
      source, target = map(urllib.parse.unquote, copied.groups())
      if source not in self.bucket.objects:
        return self._refuse(404)
      found = self.bucket.put(target, self.bucket.objects[source])
      return self._json({"done": True, "resource": found, **found})
    if path == "/batch/storage/v1":
      return self._batch(body)
    kind = query["uploadType"]
    if kind == "resumable":
      name = query.get("name") or json.loads(body)["name"]
      number = self.bucket.begin_upload(name)
      place = f"{self.bucket.url}{path}?uploadType=part&upload_id={number}"
      return self._send(200, b"", {"Location": place})
    if kind == "multipart":
      head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
      facts, content = BytesParser().parsebytes(head + body).get_payload()
      name = json.loads(facts.get_payload())["name"]
      body = content.get_payload(decode=True)
    else:
      name = query["name"]
    if self.bucket.refuses(name, query):
      return self._refuse(412)
    return self._json(self.bucket.put(name, body))

  def do_PUT(self):
    self.bucket.requests["put"] += 1
    self._part(self._address()[1]["upload_id"])

  def _part(self, upload):
    """A part of an object that comes in several; the last one makes it."""
    name, received = self.bucket.upload(upload, self._body())
    whole = self.headers.get("Content-Range", "bytes 0-0/1")
    if whole.endswith("/*"):
      last = max(len(received) - 1, 0)
      return self._send(308, b"", {"Range": f"bytes=0-{last}"})
    return self._json(self.bucket.put(name, received))

  def _batch(self, body):
    """Several deletions in one request, as gcsfs sends them."""
    kind = self.headers["Content-Type"]
    parts = BytesParser().parsebytes(
      f"Content-Type: {kind}\r\n\r\n".encode() + body
    )
    answers = []
    for part in parts.get_payload():
      line = part.get_payload().splitlines()[0]
      method, address, _ = line.split()
      assert method == "DELETE", line
      name = self._name(urllib.parse.urlsplit(address).path)
      found = name in self.bucket.objects
      if found:
        self.bucket.delete(name)
      status = "204 No Content" if found else "404 Not Found"
      answers.append(
        "--answer\r\nContent-Type: application/http\r\n"
        f"Content-ID: <response-{part.get('Content-ID', '').strip('<>')}>\r\n"
        f"\r\nHTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n\r\n"
      )
    text = "".join(answers) + "--answer--\r\n"
    self._send(
      200, text.encode(), {"Content-Type": "multipart/mixed; boundary=answer"}
    )

  def _listing(self, query):
    prefix = query.get("prefix", "")
    delimiter = query.get("delimiter")
    start = query.get("startOffset", "")
    end = query.get("endOffset")
    items, folders = [], set()
    for name in sorted(self.bucket.objects):
      if not name.startswith(prefix) or name < start or (end and name >= end):
        continue
      rest = name[len(prefix) :]
      if delimiter and delimiter in rest:
        folders.add(prefix + rest[: rest.index(delimiter) + 1])
      else:
        items.append(self.bucket.describe(name))
    found = {"kind": "storage#objects"}
    if items:
      found["items"] = items
    if folders:
      found["prefixes"] = sorted(folders)
    return found

  def _media(self, name):
    content = self.bucket.objects[name]
    facts = {
      "x-goog-generation": str(self.bucket.generations[name]),
      "ETag": str(self.bucket.generations[name]),
    }
    asked = re.fullmatch(
      r"bytes=(\d+)-(\d*)", self.headers.get("Range", "").strip()
    )
    if not asked:
      return self._send(200, content, facts)
    first = int(asked[1])
    if first >= len(content):
      return self._refuse(416)
    last = min(int(asked[2] or len(content) - 1), len(content) - 1)
    facts["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return self._send(206, content[first : last + 1], facts)

  def _address(self):
    parts = urllib.parse.urlsplit(self.path)
    return parts.path, dict(urllib.parse.parse_qsl(parts.query))

  def _name(self, path):
    return urllib.parse.unquote(path.partition("/o/")[2])

  def _body(self):
    if self.headers.get("Transfer-Encoding") == "chunked":
      body = bytearray()
      while size := int(self.rfile.readline(), 16):
        body += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
      return bytes(body)
    return self.rfile.read(int(self.headers.get("Content-Length", 0)))

  def _json(self, value):
    self._send(
      200, json.dumps(value).encode(), {"Content-Type": "application/json"}
    )

  def _refuse(self, status):
    error = {"error": {"code": status, "message": "refused"}}
    self._send(
      status, json.dumps(error).encode(), {"Content-Type": "application/json"}
    )

  def _send(self, status, body, headers=None):
    self.send_response(status)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command != "HEAD":
      # gcsfs asks for an object and for a folder at once, and hangs up on
      # the slower answer.
      with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        self.wfile.write(body)
