/* Page-aligned buffers of a reader: requests are read into them, replies are sent from them, and what a request or a
 * reply carries stays in one of them while only its number goes through the socket.
 *
 * All have one size, so that each can be used for everything; memory is only touched as far as a buffer is filled. A
 * few are kept, the last used first. A buffer belongs to who holds references to it: threads of the reader, requests
 * that were passed on, objects of Python. It outlives the reader if it must. For any thread. */
#ifndef READER_BUFFERS_H
#define READER_BUFFERS_H

#include <stddef.h>
#include <stdint.h>

struct buffers;
struct buffer {
    struct buffer *next;   /* in a list of `home` */
    struct buffers *home;
    uint32_t refs;         /* under the lock of `home` */
    uint8_t *data;
    size_t size;           /* of the mapping */
    uint64_t number;       /* of a reply to be sent, 0 otherwise */
    size_t start, length;  /* which bytes that reply has */
    int error;             /* why it has no more, 0: there are none */
};

struct buffers *buffers_new(size_t size); /* NULL: no memory */
void buffers_free(struct buffers *all);   /* its memory goes with the last buffer that is held */
struct buffer *buffer_take(struct buffers *all, size_t least); /* one reference; NULL: no memory */
void buffers_rest(struct buffers *all); /* give back what is kept */
void buffer_hold(struct buffer *b);
void buffer_drop(struct buffer *b);

/* Note that a reply will be sent from `b`, which is held until then; a number to ask for it with `buffers_sent`. `error`: an
 * errno that the bytes end before, or 0. */
uint64_t buffers_send(struct buffers *all, struct buffer *b, size_t start, size_t length, int error);
struct buffer *buffers_sent(struct buffers *all, uint64_t number); /* with its reference; NULL: no such */

#endif
