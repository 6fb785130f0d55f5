-- The five tracks that sound most alike to each of the first hundred tracks, by the cosine distance
-- of their MusiCNN embeddings (0: same direction, 2: opposite). Of files with the same content, one
-- is a neighbour. For a track of your choice, put WHERE file_key = '...' in place of ORDER BY and
-- LIMIT.
WITH heard AS (
    SELECT tracks.file_key, tracks.content_hash, tracks.top_tag, musicnn.embedding
    FROM features.tracks JOIN features.musicnn USING (file_key)
    WHERE musicnn.embedding IS NOT NULL
),
contents AS (
    FROM heard QUALIFY row_number() OVER (PARTITION BY content_hash ORDER BY file_key) = 1
)
SELECT
    a.file_key,
    b.file_key AS neighbour,
    round(array_cosine_distance(a.embedding, b.embedding)::DOUBLE, 4) AS distance,
    a.top_tag,
    b.top_tag AS neighbour_tag
FROM (FROM heard ORDER BY file_key LIMIT 100) AS a
JOIN contents AS b ON a.content_hash <> b.content_hash
QUALIFY row_number() OVER (PARTITION BY a.file_key ORDER BY distance, b.file_key) <= 5
ORDER BY a.file_key, distance, neighbour;
