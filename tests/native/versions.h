/* Pages that have versions, of an object of the world's: put one, and say whether it is there. Before it is included,
 * `version_page` makes a page by index and version. */
#ifndef VERSIONS_H
#define VERSIONS_H

static int64_t put_version(const struct tm_handle *h, uint32_t index, uint64_t version)
{
    uint8_t page[TM_PAGE];
    version_page(page, index, version);
    return tm_put(h, oid, index, page, 1, KEEP_OLD);
}

static bool has(const uint8_t *page, uint32_t index, uint64_t version)
{
    uint8_t want[TM_PAGE];
    version_page(want, index, version);
    return memcmp(page, want, TM_PAGE) == 0;
}

static bool keeps(const struct tm_handle *h, uint32_t index, uint64_t version)
{
    uint8_t page[TM_PAGE];
    return tm_get(h, oid, index, page, 1) == 1 && has(page, index, version);
}

#endif
