/* Amendments: what the replies to OPEN and CREATE say beyond what libfuse can. One waits for its reply by the handle that
 * the reply gives out. For any thread. */
#ifndef READER_AMEND_H
#define READER_AMEND_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct amendment;
struct amendments {
    pthread_mutex_t lock;
    struct amendment *first;
};

void amendments_init(struct amendments *all);
void amendments_free(struct amendments *all);
/* For the file of handle `fh`: passthrough to a backing file. -1: no memory. */
int amend_file(struct amendments *all, uint64_t fh, int32_t backing_id);
/* Amend the reply to a request of kind `opcode`, if there is anything to amend. `reads_only`: an OPEN for reading alone, so the
 * kernel need not wait at close for what there is nothing to say about. */
void amend(struct amendments *all, uint32_t opcode, bool reads_only, uint8_t *reply, size_t length);

#endif
