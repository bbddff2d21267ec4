"""A bucket of Google Cloud Storage in this process, as far as gcsfs, TensorStore and orbax use one.

The protocol is that of https://cloud.google.com/storage/docs/json_api/v1; conditions on generations
hold as they do there, as TensorStore depends on them.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OBJECTS = re.compile(
  r'(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?(/(?:rewriteTo|moveTo)/.*)?)?'
)
TIME = '2026-01-01T00:00:00.000Z'


class Refused(Exception):
  """A request is answered by an error."""

  def __init__(self, status, message):
    super().__init__(message)
    self.status, self.message = status, message


class Bucket(ThreadingHTTPServer):
  """Has the objects of one bucket.

  Attributes:
    objects: by name, generation and content.
    uploads: those that have neither ended nor been cancelled.
    downloads: names of what was read, in order.
    refuses: called with the method and the name of each request; what it returns is not None to
      answer it with that status.
  """

  daemon_threads = True
  request_queue_size = 128

  def __init__(self, name='bucket'):
    super().__init__(('localhost', 0), _Handler)
    self.name, self.objects, self.uploads, self.downloads = name, {}, {}, []
    self.refuses = lambda method, name: None
    self.generations, self.lock = itertools.count(1), threading.RLock()

  @property
  def environment(self):
    """Variables by which the clients find this server, and no other one."""
    address = f'http://localhost:{self.server_port}'
    return {
      'STORAGE_EMULATOR_HOST': address,
      'TENSORSTORE_GCS_HTTP_URL': address,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'nobody',
      'NO_GCE_CHECK': 'true',
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    }

  def names(self, folder=''):
    """The names of the objects below a folder."""
    return sorted(name for name in self.objects if name.startswith(folder))

  def handle_error(self, request, client_address):
    """Says nothing: clients that are killed break their connections."""


@contextlib.contextmanager
def serving():
  """Runs a bucket."""
  bucket = Bucket()
  thread = threading.Thread(target=bucket.serve_forever, daemon=True)
  thread.start()
  try:
    yield bucket
  finally:
    bucket.shutdown()
    bucket.server_close()


class _Handler(BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True

  def log_message(self, format, *args):
    """Says nothing."""

  def _answer(self):
    url = urllib.parse.urlsplit(self.path)
    self.query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
    self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
    headers = {}
    try:
      status, content, headers = self._route(url.path)
    except Refused as error:
      status = error.status
      content = json.dumps({'error': {'code': status, 'message': error.message}}).encode()
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    if status != 304:
      self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    self.wfile.write(b'' if status == 304 else content)

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

  def _route(self, path):
    found = OBJECTS.fullmatch(path)
    if not found:
      raise Refused(404, path)
    bucket, name, rewrite = found.groups()
    name = urllib.parse.unquote(name or self.query.get('name', ''))
    refused = self.server.refuses(self.command, name)
    if refused:
      raise Refused(refused, f'somebody does not have access to {name}')
    if bucket != self.server.name:
      raise Refused(404, f'The specified bucket {bucket} does not exist.')
    with self.server.lock:
      if path.startswith('/upload/'):
        return self._upload(name)
      if rewrite:
        target = urllib.parse.unquote(rewrite.partition('/o/')[2])
        stored = self._store(target, self._stored(name)[1])
        if rewrite.startswith('/moveTo/'):
          del self.server.objects[name]
          return self._json(stored)
        return self._json({'kind': 'storage#rewriteResponse', 'done': True, 'resource': stored})
      if not path.partition(f'/b/{bucket}')[2]:
        return self._json({'kind': 'storage#bucket', 'name': bucket, 'id': bucket})
      if not name:
        return self._list()
      return self._object(name)

  def _json(self, content):
    return 200, json.dumps(content).encode(), {'Content-Type': 'application/json'}

  def _stored(self, name):
    if name not in self.server.objects:
      raise Refused(404, f'No such object: {name}')
    return self.server.objects[name]

  def _object(self, name):
    generation, content = self._stored(name)
    if self.query.get('ifGenerationNotMatch') == str(generation):
      return 304, b'', {}
    self._check_generation(name)
    if self.command == 'DELETE':
      del self.server.objects[name]
      return 204, b'', {}
    if self.query.get('alt') != 'media':
      return self._json(self._metadata(name))
    self.server.downloads.append(name)
    headers = {'x-goog-generation': str(generation), 'Content-Type': 'application/octet-stream'}
    part = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
    if not part:
      return 200, content, headers
    first, last = part.groups()
    begin = int(first) if first else max(len(content) - int(last), 0)
    end = min(int(last) + 1, len(content)) if first and last else len(content)
    if begin >= len(content):
      raise Refused(416, 'The requested range cannot be satisfied.')
    headers['Content-Range'] = f'bytes {begin}-{end - 1}/{len(content)}'
    return 206, content[begin:end], headers

  def _list(self):
    prefix, delimiter = self.query.get('prefix', ''), self.query.get('delimiter')
    begin, end = self.query.get('startOffset', ''), self.query.get('endOffset', chr(0x10FFFF))
    items, prefixes = [], set()
    for name in self.server.names(prefix):
      below = name[len(prefix) :]
      if delimiter and delimiter in below:
        prefixes.add(prefix + below[: below.index(delimiter) + 1])
      elif begin <= name < end:
        items.append(self._metadata(name))
    return self._json({'kind': 'storage#objects', 'items': items, 'prefixes': sorted(prefixes)})

  def _upload(self, name):
    if 'upload_id' in self.query:
      return self._upload_part(self.query['upload_id'])
    kind, content = self.query['uploadType'], self.body
    if kind == 'resumable':
      name = name or json.loads(self.body)['name']
      key = f'upload{next(self.server.generations)}'
      self.server.uploads[key] = name, b''
      host = f'http://{self.headers["Host"]}{self.path}&upload_id={key}'
      return 200, b'', {'Location': host}
    if kind == 'multipart':
      # Content may be anything, so what email.parser makes of ends of lines would not do.
      boundary = b'--' + re.search('boundary="?([^";]+)', self.headers['Content-Type'])[1].encode()
      line = b'\r\n' if boundary + b'\r\n' in self.body else b'\n'
      described, content = (
        part.split(2 * line, 1)[1].removesuffix(line) for part in self.body.split(boundary)[1:3]
      )
      name = name or json.loads(described)['name']
    return self._json(self._store(name, content))

  def _upload_part(self, key):
    name, content = self.server.uploads[key]
    if self.command == 'DELETE':
      del self.server.uploads[key]
      return 499, b'', {}
    content += self.body
    total = self.headers.get('Content-Range', '').rpartition('/')[2]
    if total == '*' or (total and int(total) > len(content)):
      self.server.uploads[key] = name, content
      return 308, b'', {'Range': f'bytes=0-{len(content) - 1}'}
    del self.server.uploads[key]
    return self._json(self._store(name, content))

  def _check_generation(self, name):
    generation = self.server.objects.get(name, (0,))[0]
    if self.query.get('ifGenerationMatch', str(generation)) != str(generation):
      raise Refused(412, 'At least one of the pre-conditions you specified did not hold.')

  def _store(self, name, content):
    self._check_generation(name)
    self.server.objects[name] = next(self.server.generations), content
    return self._metadata(name)

  def _metadata(self, name):
    generation, content = self.server.objects[name]
    return {
      'kind': 'storage#object',
      'bucket': self.server.name,
      'name': name,
      'generation': str(generation),
      'metageneration': '1',
      'size': str(len(content)),
      'md5Hash': base64.b64encode(hashlib.md5(content).digest()).decode(),
      'timeCreated': TIME,
      'updated': TIME,
    }
