/* Requests that come over io_uring (Linux 6.14 and newer) instead of by read(2): a ring and a thread for each CPU.
 *
 *   program -> the kernel's queue of its CPU -> an entry -> the ring's thread -> answered in place, or passed on
 *
 * An entry is a buffer that the kernel knows; it brings one request, and is the kernel's again once its answer was
 * committed, which asks for the next request in the same call. So a hit takes one system call, and when many come, one
 * for several. What is passed on keeps its entry until it is answered, by whichever thread (`entry_answer`): the ring's
 * thread is told by an eventfd and commits, since the kernel copies in the thread that owns the ring. As many requests
 * of a CPU can be under way as its queue has entries (`ENTRIES`); further ones, hits too, wait in the kernel.
 *
 * FORGET, INTERRUPT and notices stay with the device, whoever reads it.
 *
 * The kernel sends programs' requests nowhere from the reply to INIT that asks for rings until every queue has an entry,
 * or one was refused. So what can fail is tried before that reply (`rings_new`), and if starting fails after it, an
 * entry is registered that is refused: requests then come by the device (`rings_start`).
 *
 * A thread that ends leaves its entries to nobody: a request that the kernel is just handing over would be lost. So rings
 * are stopped only when the device is about to be closed, and a mount that has them cannot be restarted by exec.
 *
 * Not for what a request is answered with: `reader.c`. Threads: `rings_new` to `rings_free` are for one; `entry_answer` for
 * any. */
#ifndef READER_RINGS_H
#define READER_RINGS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct fuse_in_header;
struct rings;
struct entry;

/* Called by a ring's thread with a request. True: it was answered with `entry_fill`. False: it will be answered (or was)
 * with `entry_answer`, and the entry is not the caller's any more. */
typedef bool (*ring_serve)(void *with, unsigned ring, struct entry *e);

/* For requests and replies that carry at most `payload_bytes`. NULL: errno. */
struct rings *rings_new(size_t payload_bytes);
unsigned rings_count(const struct rings *all);
/* By which the kernel knows a ring: whoever has it lead elsewhere (dup2) ends it, once its thread has ended, too. */
int rings_descriptor(const struct rings *all, unsigned ring);
uint64_t rings_found_awake(const struct rings *all); /* requests that were looked for, and came, before a thread slept */
/* Take requests from the device (`serve` NULL: let the kernel know that none will be taken); once. -1: an entry was refused, errno says why, and requests come by read(2). They may come by
 * rings all the same if it was not the first of its queue, so the threads go on. */
int rings_start(struct rings *all, int device, ring_serve serve, void *with);
/* Take no more; no thread calls `serve` after that. Answers to what is under way go nowhere. */
void rings_stop(struct rings *all);
/* Nobody may have an entry. */
void rings_free(struct rings *all);

const struct fuse_in_header *entry_request(const struct entry *e);
const void *entry_argument(const struct entry *e); /* what follows the header, as far as it is of fixed size */
size_t entry_most(const struct entry *e); /* bytes that an answer may have */
/* Where the payload of the answer goes, of which some `bytes` will be written: at most two pages more than it may have. */
uint8_t *entry_payload(struct entry *e, size_t bytes);
/* Copy the request as the device would have brought it; its length, 0: it makes no sense. */
size_t entry_copy(const struct entry *e, uint8_t *to, size_t room);
/* Answer with an error (0 or a negative errno) and bytes, which may lie in the payload. */
void entry_fill(struct entry *e, int error, const uint8_t *bytes, size_t length);
void entry_answer(struct entry *e, int error, const uint8_t *bytes, size_t length);

#endif
