-- Files that are there more than once: with the same content, or, in another format or with other
-- tags, of the same length to a second and with MusiCNN embeddings that hardly differ.
WITH heard AS (
    SELECT tracks.file_key, tracks.content_hash, tracks.duration_s, musicnn.embedding
    FROM features.tracks LEFT JOIN features.musicnn USING (file_key)
)
SELECT
    a.file_key,
    b.file_key AS other,
    CASE WHEN a.content_hash = b.content_hash THEN 'same content' ELSE 'sounds the same' END AS why
FROM heard AS a
JOIN heard AS b ON a.file_key < b.file_key AND (
    a.content_hash = b.content_hash
    OR abs(a.duration_s - b.duration_s) < 1
    AND array_cosine_distance(a.embedding, b.embedding) < 0.001
)
ORDER BY why, a.file_key, other;
