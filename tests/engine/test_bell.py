"""A rank in a process of its own rings when a KV transfer has ended."""

import threading

import zmq

from lightllm.engine import process_executor
from lightllm.server.worker_main import Outbox


def test_a_ring_is_heard_and_the_end_of_the_context_is_the_end_of_listening(tmp_path):
    address, heard = f"ipc://{tmp_path}/bell", threading.Semaphore(0)
    there, here = zmq.Context(), zmq.Context()
    outbox = Outbox(there, address)
    outbox.ring()  # nobody is there yet
    bell = here.socket(zmq.PULL)
    bell.bind(address)
    thread = threading.Thread(target=process_executor._listen, args=(bell, heard.release))
    thread.start()
    outbox.ring()
    assert heard.acquire(timeout=5)
    assert heard.acquire(timeout=5)
    here.term()
    thread.join(5)
    assert not thread.is_alive()
    outbox.close()
    there.destroy(linger=0)
