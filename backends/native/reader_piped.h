/* Large replies by way of a pipe: the pages of the sender's memory go into it (vmsplice) and from there to the device (splice).
 *
 * By writev the kernel looks up each page by itself while it copies it, by vmsplice 16 at once, which for a huge page is one
 * look-up: 5 to 10 % less from one request of 1 MiB to the next. The copy to who reads is made within the splice, so that the memory is
 * free once it returns, as after writev.
 *
 * A pipe has a place for each page and one for the header, so a MiB does not fit into what anybody may have (1 MiB, unless
 * fs.pipe-max-size says more): one of 2 MiB needs CAP_SYS_RESOURCE. Whatever fails leaves the reply to writev, and the pipe with
 * all that is in it is closed.
 *
 * For one thread. */
#ifndef READER_PIPED_H
#define READER_PIPED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct piped {
    int device;     /* -1: replies do not go by a pipe */
    int ends[2];    /* -1: there is no pipe now */
    size_t largest; /* bytes of a reply */
    size_t places;
    unsigned failures;
    bool lately; /* it was used since it was asked the last time */
};

enum {
    PIPED_LEAST = 128 << 10, /* bytes: 64 KiB gain nothing by two calls instead of one */
    PIPED_FAILURES = 16,    /* after which there is no pipe any more: somebody forbids one of the calls that send, or there is no memory */
};

void piped_init(struct piped *p, int device, size_t largest);
void piped_free(struct piped *p);
/* Close a pipe that was not used since the last time; `all`: in any case. */
void piped_rest(struct piped *p, bool all);
/* Reply to a request, like `reply_bytes`. False: it was not sent, so that it has to be in another way. */
bool piped_reply(struct piped *p, uint64_t unique, const uint8_t *data, size_t length);

#endif
