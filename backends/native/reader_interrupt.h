/* Requests whose programs do not wait any longer. For who holds the lock of `passing`.
 *
 * The kernel tells of any signal that reaches a program while it waits (FUSE_INTERRUPT), once. Only a program that is going
 * to die may be told that its request was interrupted: no other expects that of a file. So who waits is looked up in
 * /proc: has it a fatal signal? If not, it is looked again from time to time, since a later signal is not told.
 *
 * Which requests can be given up: those that change nothing, and of which what libfuse does about them can be undone when
 * its reply comes (a lookup is forgotten, a file closed). A write, or a change of names or attributes, is waited for: it
 * will be made, and whoever comes next must find it made. */
#ifndef READER_INTERRUPT_H
#define READER_INTERRUPT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct fuse_in_header;
/* Whether a request may be answered with EINTR while libfuse is at it. */
bool may_be_given_up(const struct fuse_in_header *in, size_t length);
/* Whether a thread has a signal that will end it, and has not ended yet. */
bool is_dying(uint32_t thread);
/* What undoes the success of a request that was given up, by its reply: the length of a request in `out` (of at least
 * the reply's size and 64 bytes), 0: nothing. `answered`: libfuse will reply to it. */
size_t undo(uint32_t opcode, const uint8_t *reply, size_t length, uint8_t *out, bool *answered);

#endif
